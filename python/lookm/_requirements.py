"""One clear error where transformers is missing or too old."""

from importlib.metadata import PackageNotFoundError, version

OLDEST = (5, 4)

try:
    found = version("transformers")
except PackageNotFoundError:
    found = "none"
if found == "none" or tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"lookm needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, found {found}: "
        f'pip install "transformers>={OLDEST[0]}.{OLDEST[1]},<6"'
    )
