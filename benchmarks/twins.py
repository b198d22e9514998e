"""Twins of a checkpoint: the same function in float32, with weights and activations that are hard to quantize.

    python -m benchmarks.twins CHECKPOINT OUT --kind channels|wo|both

`channels`: in front of every projection a few channels become 50 to 200 times larger, through the gains of the norms and
the rows of the values, and the projection's columns as much smaller. `wo`: the same for the channels of the feed-forward
blocks, whose output projection then reads massive activations. `both`: both.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

State = dict[str, npt.NDArray[np.float32]]
KINDS = ("channels", "wo", "both")


def write_twin(checkpoint: Path, out: Path, kind: str, seed: int = 0) -> Path:
    """Write a twin of a checkpoint folder with one `model.safetensors`."""
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
    state = {name: tensor.astype(np.float32) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    rng = np.random.default_rng(seed)
    if kind in ("channels", "both"):
        for gain, readers in _norms(state):
            factor = _factors(rng, len(state[gain]))
            state[gain] = state[gain] * factor
            for reader in readers:
                state[reader] = state[reader] / factor
        for name in [each for each in state if each.endswith("Attention.v.weight")]:
            _move(state, rng, name, name.replace(".v.", ".o."))
    if kind in ("wo", "both"):
        for name in [each for each in state if each.endswith((".wi_1.weight", ".wi.weight"))]:
            _move(state, rng, name, name[: name.rindex(".wi")] + ".wo.weight")
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in state.items()}, out / "model.safetensors")
    return out


def _move(state: State, rng: np.random.Generator, writer: str, reader: str) -> None:
    factor = _factors(rng, len(state[writer]))
    state[writer] = state[writer] * factor[:, None]
    state[reader] = state[reader] / factor


def _factors(rng: np.random.Generator, channels: int) -> npt.NDArray[np.float32]:
    """50 to 200 for one channel in a hundred, and for two at least; 1 for the others."""
    factor = np.ones(channels, np.float32)
    chosen = rng.choice(channels, max(2, channels // 100), replace=False)
    factor[chosen] = rng.uniform(50, 200, len(chosen))
    return factor


def _norms(state: State) -> Iterator[tuple[str, list[str]]]:
    """Each gain and the projections that read it; not the last one of a tied head."""
    for gain in [name for name in state if name.endswith("layer_norm.weight")]:
        layer = gain.removesuffix("layer_norm.weight")
        if gain == "encoder.final_layer_norm.weight":
            yield gain, [name for name in state if name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))]
        elif gain == "decoder.final_layer_norm.weight":
            if "lm_head.weight" in state:
                yield gain, ["lm_head.weight"]
        else:
            ends = ("EncDecAttention.q.weight",) if f"{layer}EncDecAttention.q.weight" in state else _OWN
            yield gain, [name for name in state if name.startswith(layer) and name.endswith(ends)]


_OWN = tuple(f"SelfAttention.{part}.weight" for part in "qkv") + tuple(f".wi{end}.weight" for end in ("", "_0", "_1"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", choices=KINDS, required=True)
    arguments = parser.parse_args()
    write_twin(arguments.checkpoint, arguments.out, arguments.kind)


if __name__ == "__main__":
    main()
