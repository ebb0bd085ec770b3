"""transformers' own common tests, run on small BLSP-KD models: `pytest -m hf_common`.

They come from the source distribution of the installed transformers version (`sdist.py`), which is fetched on first
use; `plugin.py` counts and reports. Leaves out: the generation and export tests, which that distribution lacks.
"""
