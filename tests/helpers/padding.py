"""Pad the inputs of several prompts into one batch, as a processor does."""

import torch


def left_padded(family, rows):
    """Tokens are padded on the left, images on the right and below. A prompt without an image has an empty one."""
    counts = [row["batch_num_images"] for row in rows if "batch_num_images" in row]
    batch = {"batch_num_images": torch.cat(counts)} if counts else {}
    for name in family.inputs.keys() & {name for row in rows for name in row} - batch.keys():
        dimensions = family.inputs[name]
        known = [row[name] for row in rows if name in row]
        sizes = [max(value.shape[axis] for value in known) for axis in range(1, known[0].dim())]
        empty = known[0].new_zeros([1, *sizes])
        values = [row.get(name, empty) for row in rows if name in row or dimensions[0] == "batch"]
        batch[name] = torch.cat([_padded(value, dimensions, sizes) for value in values])
    return batch


def _padded(value, dimensions, sizes):
    padded = value.new_zeros([len(value), *sizes])
    place = [slice(-size, None) if name == "tokens" else slice(size) for name, size in zip(dimensions, value.shape)]
    padded[tuple(place)] = value
    return padded
