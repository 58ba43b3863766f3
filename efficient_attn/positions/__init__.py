"""How positions reach the model: added to embeddings, or applied to queries and keys."""

from collections.abc import Mapping

from efficient_attn.positions.absolute import Learned, NoPositions, Sinusoidal
from efficient_attn.positions.rotary import NoRotation, Rotary

EMBEDDINGS: Mapping[str, type] = {"none": NoPositions, "sinusoidal": Sinusoidal, "learned": Learned}
"""Modules added to token embeddings: `config.model.positions = dict(name=...)`."""

ROTATIONS: Mapping[str, type] = {"none": NoRotation, "rotary": Rotary}
"""What attention does to queries and keys: `config.model.mixer.rotation = dict(name=...)`."""
