"""How are the bundled tiny model and its verifier made and tried out, on the world of ``llava_cot.data.shapes``?"""
