"""FlashInfer's kernels in software: what they read, check and compute, without a GPU.

Written from FlashInfer's own sources alone (0.6.11 and 0.7.2), never from rollmill's: a test that runs
rollmill's calls against this package compares two independent readings of the same contract.

    def test_a_linear(model_library):                # tests/conftest.py; compute capability 10.0
        out = kernel.apply(x, packed)                # ends in flashinfer.mm_fp4(...) on CPU tensors
        name, arguments = model_library.calls[-1]    # what was passed, as inspect.BoundArguments
        assert arguments.arguments["backend"] == "cute-dsl"

    def test_a_tactic_gives_nan(model_library):
        model_library.faults.add("fp4_gemm", "nan", tactic=2, when=lambda num_tokens: num_tokens > 64)

The real Python functions of the installed FlashInfer run: their signatures, checks, choice of backend and autotuner.
What a CUDA library would do below them is modelled:

    decoding     E2M1, E4M3, scale layouts by byte index, row shuffles: bytes -> values per logical (row, k)
    quantizers   NVFP4 per tensor and per token (the exact recipe), FP8 per token
    gemms        mm_fp4's backends and bmm_fp8: contracts and products
    routing      logits -> expert ids and weights
    moe          two grouped GEMMs with SwiGLU between, NVFP4 and FP8
    launchers    the C++ entry points of the fused MoE
    contracts    what they ask of their arguments, and stricter
    faults       wrong results on purpose, by op, tactic and number of tokens
    calls        what is refused before the library sees it, and what is recorded
    library      puts all of it under the real module, with pytest's monkeypatch

A broken contract is a ValueError, TypeError or AssertionError that names the argument.
"""
