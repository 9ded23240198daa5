"""Run by itself, since it imports Megatron: writes its data sets and reads ours, told by lines of JSON.

{"write": PREFIX, "dtype": "int32", "documents": [[[ids of a sequence], ...], ...]}      {"read": PREFIX}
"""

import json
import sys

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

for line in sys.stdin:
    task = json.loads(line)
    if prefix := task.get("write"):
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(numpy, task["dtype"]))
        for document in task["documents"]:
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        print("{}")
    else:
        stored = IndexedDataset(task["read"])
        sequences = [stored[i].tolist() for i in range(len(stored))]
        dtype = str(numpy.dtype(stored.index.dtype))
        print(json.dumps({"documents": stored.document_indices.tolist(), "sequences": sequences, "dtype": dtype}))
