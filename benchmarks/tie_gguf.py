"""Rewrite a .gguf model whose output matrix is stored apart from its embedding: one matrix for both, the output's.

    python benchmarks/tie_gguf.py MODEL.gguf TIED.gguf           # needs the package gguf

Every other tensor and setting is copied as it is, quantised. Qwen2.5-Coder-0.5B-Instruct, 491 MB, becomes 398 MB, and
has the 494M parameters that it was trained with. benchmarks/gsm8k.sh sends it to a GPU.
"""

from pathlib import Path

import gguf
import tyro
from tyro.conf import Positional

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
WRITTEN_ANYWAY = ("GGUF.", "general.architecture")  # by the writer itself


def tie(source: Positional[Path], target: Positional[Path]) -> None:
    reader = gguf.GGUFReader(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if OUTPUT not in tensors:
        raise SystemExit(f"error: {source} has no {OUTPUT}: it is tied already")
    tensors[EMBEDDING] = tensors.pop(OUTPUT)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(WRITTEN_ANYWAY):
            of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], of_items)
    for name, tensor in tensors.items():
        data = tensor.data
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(tensor.data)
    writer.close()


if __name__ == "__main__":
    tyro.cli(tie, description=__doc__)
