"""One layer of routed experts of Qwen3-30B-A3B's shape on a GPU, in a CUDA graph: BF16, FP8, NVFP4 W4A16, W4A4's twin.

    python benchmarks/gpu_moe.py [--peers] [--sweep TOKENS ...] [--once TOKENS ...]

Limit: the bytes of the experts that are touched at the rate of a copy, or the multiplications at the GPU's measured
peak, whichever takes longer. Calls take turns with several sets of tokens, so that the L2 holds the experts of no
other. `--peers` times SGLang and vLLM beside it (see peers_moe.py). `--sweep` times the products alone over tiles, to
fill the runner's tables; `--once` launches every product once, for a profiler to look at.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from gpu_quantize import copy_rate, graphed
from peers_moe import CANDIDATES, PEERS, Peer, Tile as PeerTile, compile_candidates, find_peers
from record import make_result, save
from torch import Tensor

from rollmill.moe import MoeConfig
from rollmill.moe.runners.reference import expert_shapes
from rollmill.moe.runners.triton import TritonRunner
from rollmill.moe.runners.triton_tiles import DEPTH, Tile
from rollmill.quant import BF16, FP8, NVFP4, FP8Rows, Scheme, find_capability

CONFIG = MoeConfig(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
SCHEMES: dict[str, Scheme] = {
    "bf16": BF16,
    "fp8": FP8(per_channel=True),
    "nvfp4": NVFP4(activation="none"),
    "nvfp4_twin": NVFP4(),
}
PEAK = {
    "bf16": 733e12,
    "fp8": 1347e12,
    "nvfp4": 733e12,
    "nvfp4_twin": 733e12,
}  # measured on this GPU: `_scaled_mm` and BF16 products of 8192^3
BATCHES = (1, 32, 128, 256, 1024, 4096, 16384)
TUNED = (32, 128, 256, 16384)  # numbers of tokens at which peers get the best of some tiles, too


class Layer:
    """Random experts, packed."""

    def __init__(self, scheme: Scheme) -> None:
        self.runner = TritonRunner(CONFIG, scheme, find_capability("cuda"), torch.bfloat16)
        self.packed: list[dict[str, Tensor]] = []
        self.stored: list[dict[str, Tensor]] = []
        self.scheme = scheme
        for shape, kernel in zip(expert_shapes(CONFIG), (self.runner.w13, self.runner.w2), strict=True):
            stored = scheme.quantize((torch.randn(shape.matrix, device="cuda") * 0.03).bfloat16(), shape)
            self.stored.append(stored)
            matrices = {key: stored[key] for key in scheme.matrices(shape)}
            self.packed.append(kernel.prepare(matrices) | kernel.derive({k: stored[k] for k in scheme.scales(shape)}))

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The whole layer from BF16 on; FP8 codes are made first, as a model's norms hand them over."""
        from rollmill.quant.gpu.quantize import quantize_fp8

        given = FP8Rows(*quantize_fp8(x)) if self.runner.takes_codes else x
        return self.runner.choices(given, ids, weights, *self.packed).sum()

    @property
    def bytes_an_expert(self) -> float:
        return sum(t.nbytes for packed in self.packed for t in packed.values()) / CONFIG.num_experts


def asked(tokens: int, draw: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights: the same for every scheme."""
    generator = torch.Generator("cuda").manual_seed(tokens + 100003 * draw)
    scores = torch.rand(tokens, CONFIG.num_experts, device="cuda", generator=generator)
    x = torch.randn(tokens, CONFIG.hidden_size, device="cuda", generator=generator).bfloat16()
    weights = torch.rand(tokens, CONFIG.top_k, device="cuda", generator=generator)
    return x, scores.topk(CONFIG.top_k, dim=1).indices, weights


def draws(tokens: int) -> range:
    """Sets of tokens that take turns: of a single token's experts several sets fit the L2."""
    return range(8 if tokens <= 4 else 4)


def check(layer: Layer, name: str) -> None:
    """Against dequantized weights in float32, a token bit-equal alone."""
    x, ids, weights = asked(33)
    out = layer(x, ids, weights)
    assert torch.equal(layer(x[5:6], ids[5:6], weights[5:6])[0], out[5]), name
    assert bool(torch.isfinite(out).all()), name


def beside(peers: list[Peer], layer: Layer, tokens: int) -> dict[str, float]:
    """Microseconds of every peer's layer on the same tokens: with its default tile, and with the best of some."""
    x, ids, weights = asked(tokens)
    ours, ids = layer(x, ids, weights), ids.int()
    found: dict[str, float] = {}
    for peer in peers:
        theirs = peer.call(x, ids, weights)
        error = float((theirs.float() - ours.float()).norm() / ours.float().norm())
        assert error < 0.02, f"{peer.name} computes something else: {error}"
        found[f"{peer.name}, default tile" if peer.tune else peer.name] = micros_of(peer, None, tokens)
        if peer.tune is not None and tokens in TUNED:
            micros = {i: micros_of(peer, tile, tokens) for i, tile in enumerate(CANDIDATES[tokens > 1024])}
            best = min(micros, key=lambda i: micros[i])
            found[f"{peer.name}, best tile of {len(micros)}"] = micros[best]
            print(peer.name, tokens, micros[best], CANDIDATES[tokens > 1024][best], flush=True)
    return found


def micros_of(peer: Peer, tile: PeerTile | None, tokens: int) -> float:
    sets = [(x, ids.int(), weights) for x, ids, weights in (asked(tokens, draw) for draw in draws(tokens))]
    try:
        with peer.tune(tile) if peer.tune else nullcontext():
            return graphed([lambda given=given: peer.call(*given) for given in sets], repeats=9) * 1e6
    except Exception as error:  # a tile that does not fit
        if tile is None:
            raise
        print("failed", peer.name, tile, f"{error!r:.80}", flush=True)
        return float("inf")


def bench(*, with_peers: bool) -> None:
    copy = copy_rate()
    if with_peers:
        compile_candidates()
    results = []
    for name, scheme in SCHEMES.items():
        layer = Layer(scheme)
        check(layer, name)
        peers = find_peers(name, layer.stored) if with_peers and name in PEERS else []
        for tokens in BATCHES:
            x, ids, weights = asked(tokens)
            touched = int(ids.unique().numel())
            moved = touched * layer.bytes_an_expert + 4 * x.nbytes
            operations = 6 * tokens * CONFIG.top_k * CONFIG.hidden_size * CONFIG.intermediate_size
            limit = max(moved / copy, operations / PEAK[name]) * 1e6
            sets = [asked(tokens, draw) for draw in draws(tokens)]
            calls: list[Callable[[], object]] = [lambda given=given, layer=layer: layer(*given) for given in sets]
            micros = graphed(calls, repeats=15) * 1e6
            products = products_micros(layer, tokens, ids)
            bound = "copy rate" if moved / copy > operations / PEAK[name] else "peak"
            note = f"{touched} experts; {limit / micros:.0%} of the {bound}; products alone {products:.0f} us"
            others = beside(peers, layer, tokens)
            note += "".join(f"; {peer} {us:.0f}" for peer, us in others.items())
            best = min(others, key=lambda peer: others[peer]) if others else None
            figure = {"limit": limit, "peer": others.get(best or ""), "peer_name": best, "note": note}
            results.append(make_result(f"moe_{name}_m{tokens}_us", micros, "us", **figure))
            print(results[-1].name, f"{micros:.0f} us, limit {limit:.0f};", note, flush=True)
    save("gpu_moe", results)


def products_micros(layer: Layer, tokens: int, ids: Tensor) -> float:
    """The two grouped products without sorting, quantizing and summing."""
    return sum(graphed([call] * 4, repeats=9) * 1e6 for call in product_calls(layer, tokens, ids, {}))


def product_calls(layer: Layer, tokens: int, ids: Tensor, tiles: dict[str, Tile]) -> Iterator[Callable[[], object]]:
    """Both products, each by itself, with the runner's tiles where `tiles` has no other."""
    from rollmill.moe.gpu.blocks import make_blocks
    from rollmill.quant.gpu.quantize import quantize_fp8

    runner, num_pairs = layer.runner, ids.numel()
    if not tiles and runner.takes_codes and runner.takes_blocks(num_pairs):
        yield from block_calls(layer, tokens, ids)
        return
    for weight, packed, shape in zip(("w13", "w2"), layer.packed, expert_shapes(CONFIG), strict=True):
        tile = tiles.get(weight) or runner._tile(weight, num_pairs)
        blocks = make_blocks(ids, CONFIG.num_experts, tile.tokens)
        x = torch.randn(tokens if weight == "w13" else num_pairs, shape.cols or 0, device="cuda").bfloat16()
        out = x.new_empty(num_pairs, shape.rows[0])
        x, scale = quantize_fp8(x) if isinstance(layer.scheme, FP8) else (x, x.new_ones(len(x), dtype=torch.float32))
        options = {"SORTED": True} | ({"TOP_K": CONFIG.top_k} if weight == "w13" else {})
        arguments = (weight, tile, x, scale, packed, out, blocks, num_pairs)
        yield lambda arguments=arguments, options=options: runner._launch(*arguments, **options)


def block_calls(layer: Layer, tokens: int, ids: Tensor) -> Iterator[Callable[[], object]]:
    """The same of FP8 codes block by block."""
    from rollmill.moe.gpu.blocks import make_placed_blocks
    from rollmill.moe.gpu.fp8_many import TOKENS, multiply_down, multiply_gate_up
    from rollmill.quant.gpu.quantize import quantize_fp8

    pairs, experts, _, used = make_placed_blocks(ids, CONFIG.num_experts, TOKENS)
    (w13, w2), num_pairs = layer.packed, ids.numel()
    x = quantize_fp8(torch.randn(tokens, CONFIG.hidden_size, device="cuda").bfloat16())
    inner = quantize_fp8(torch.randn(len(pairs), CONFIG.intermediate_size, device="cuda").bfloat16())
    yield lambda: multiply_gate_up(*x, w13["weight"], w13["row_scale"], pairs, experts, num_pairs)
    yield lambda: multiply_down(*inner, w2["weight"], w2["row_scale"], experts, used)


def candidates(scheme: Scheme, weight: str, average: float) -> Iterator[Tile]:
    """Tiles worth timing."""
    blocks = (8, 16) if average <= 12 else (16, 32) if average <= 20 else (32, 64) if average <= 80 else (64, 128, 256)
    if isinstance(scheme, NVFP4) and average <= 12:
        yield from (Tile(*sizes) for sizes in itertools.product((32, 64), blocks, (DEPTH,), (1, 2), (2, 3, 4)))
        return
    depths = {"bf16": (64, 128), "fp8": (128, 256)}.get(scheme.name, (DEPTH,))
    for rows, block, depth, warps in itertools.product((64, 128, 256), blocks, depths, (4, 8)):
        sums = rows * block * (2 if weight == "w13" else 1)  # float32, in registers
        if (
            block >= 16
            and sums * (4 if block <= 32 else 1) >= 4096
            and sums <= 4096 * warps
            and block * depth <= 256 * 128
        ):
            yield from (Tile(rows, block, depth, warps, stages) for stages in (3, 4))


def sweep(batches: list[int]) -> None:
    for (name, scheme), tokens in itertools.product(SCHEMES.items(), batches):
        layer, (_, ids, _) = Layer(scheme), asked(tokens)
        for weight, index in (("w13", 0), ("w2", 1)):
            found = []
            for tile in candidates(scheme, weight, ids.numel() / CONFIG.num_experts):
                try:
                    call = list(product_calls(layer, tokens, ids, {weight: tile}))[index]
                    found.append((round(graphed([call] * 2, repeats=5) * 1e6, 1), tuple(tile)))
                except Exception as error:  # a tile that does not fit
                    if "resource" not in str(error):
                        print("failed", tile, str(error)[:100], flush=True)
            found.sort()
            print(name, weight, tokens, found[:4], "worst", found[-1][0], "of", len(found), flush=True)


def once(batches: list[int]) -> None:
    for scheme in SCHEMES.values():
        layer = Layer(scheme)
        for tokens in batches:
            for call in product_calls(layer, tokens, asked(tokens)[1], {}):
                call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", type=int, nargs="+")
    parser.add_argument("--once", type=int, nargs="+")
    parser.add_argument("--peers", action="store_true")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep(arguments.sweep)
    elif arguments.once:
        once(arguments.once)
    else:
        bench(with_peers=arguments.peers)
