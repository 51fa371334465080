"""How the bundled tiny model and its verifier are made and tried out, on the world of ``llava_cot.data.shapes``."""
