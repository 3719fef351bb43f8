"""Weights in buckets, one session; a sender that dies leaves the old version serving."""

from safetensors.torch import load_file

from rollmill.engine import Engine, EngineConfig

FOLDER = "tests/data/llm/qwen3/bf16"
weights = list(load_file(f"{FOLDER}/model.safetensors").items())
buckets = [weights[start : start + 8] for start in range(0, len(weights), 8)]

with Engine(FOLDER, EngineConfig(quant="fp8")) as engine:
    try:
        with engine.weight_session(version="1") as session:
            for bucket in buckets[:2]:
                session.load(bucket)
            raise ConnectionError("the trainer is gone")
    except ConnectionError:
        print("still serving", engine.weight_version)

    with engine.weight_session(version="2") as session:
        for bucket in buckets:
            session.load(bucket)
    print("now serving", engine.weight_version, session.report)
