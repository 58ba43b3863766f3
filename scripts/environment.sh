# Sourced by the other scripts: makes .venv from requirements.txt if it is not there or out of date, and enters it.
# PYTHON names the interpreter, 3.11 or newer.
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "Python 3.11 or newer is needed; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11." >&2
  exit 1
fi
wanted="$("$PYTHON" --version) $(cat requirements.txt)"
if [ "$(cat .venv/installed.txt 2>/dev/null)" != "$wanted" ]; then
  "$PYTHON" -m venv --clear .venv || { echo "On Debian: apt install python3-venv" >&2; exit 1; }
  .venv/bin/python -m pip install --quiet --upgrade pip &&
    .venv/bin/python -m pip install --quiet -r requirements.txt &&
    printf '%s\n' "$wanted" > .venv/installed.txt || exit 1
fi
source .venv/bin/activate
