"""The plan of a decoder's slots: which incoming names are renamed, ignored or tied."""

from __future__ import annotations

from ..weight_sync import SyncPlan
from .llm.decoder import Decoder


def make_sync_plan(model: Decoder, kv_cache: str | None) -> SyncPlan:
    """`kv_cache`: the format of the checkpoint's KV cache, None if it is not quantized."""
    ignored = {"*.rotary_emb.inv_freq": "computed from config.json"}
    if kv_cache is None:
        ignored |= {f"*.{name}": "the KV cache is not quantized" for name in ("k_scale", "v_scale")}
    ignored |= dict(model.config.names.ignored)
    return SyncPlan(
        model.slots,
        renames=model.config.names.renames,
        ignored=ignored,
        tied={"lm_head.weight": "model.embed_tokens.weight"} if model.config.tied else None,
    )
