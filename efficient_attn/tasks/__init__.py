"""Every task, by the name that `config.task = dict(name=...)` uses."""

from collections.abc import Mapping

from efficient_attn.tasks.base import SPLITS, Task, TaskError
from efficient_attn.tasks.image import Image
from efficient_attn.tasks.listops import ListOps
from efficient_attn.tasks.lm_text import LMText
from efficient_attn.tasks.lm_tokens import LMTokens
from efficient_attn.tasks.pathfinder import Pathfinder
from efficient_attn.tasks.retrieval import Retrieval
from efficient_attn.tasks.synthetic import InductionHeads, MultiQueryRecall, SelectiveCopying
from efficient_attn.tasks.text import Text

__all__ = ["SPLITS", "TASKS", "Task", "TaskError"]

TASKS: Mapping[str, type[Task]] = {
    "listops": ListOps,
    "pathfinder": Pathfinder,
    "text": Text,
    "retrieval": Retrieval,
    "image": Image,
    "multi_query_recall": MultiQueryRecall,
    "induction_heads": InductionHeads,
    "selective_copying": SelectiveCopying,
    "lm_text": LMText,
    "lm_tokens": LMTokens,
}
