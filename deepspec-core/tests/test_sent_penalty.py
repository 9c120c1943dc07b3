"""The repetition penalty as each engine that can be measured takes it."""

import pytest

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.servers.connection import Fault
from deepspec_core.servers.engines import ENGINES
from deepspec_core.servers.wanted import Wanted
from deepspec_core.testing.tiny_tokenizer import tiny_tokenizer


def _wanted(sampling: Sampling) -> Wanted:
    return Wanted(
        tokenizer=ChatTokenizer(tiny_tokenizer()),
        sampling=sampling,
        max_tokens=16,
        max_length=64,
        timeout=20.0,
        names=("m",),
        vocab_size=340,
        stop_ids=(1,),
        end_id=1,
    )


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_every_engine_that_is_measured_is_sent_the_penalty(penalty: float) -> None:
    wanted = _wanted(Sampling(temperature=0.0, repetition_penalty=penalty))
    for engine in ENGINES:
        body = engine.dialect.body(wanted, model="m", prompt_ids=(3, 4), limit=5, seed=1)
        settings = body.get("sampling_params", body)
        assert settings["repeat_penalty" if engine.name == "llama.cpp" else "repetition_penalty"] == penalty
        if engine.name == "llama.cpp":
            assert ("penalties" in settings["samplers"]) == (penalty != 1)
            assert settings["repeat_last_n"] == 2 + 5, "the prompt and the answer"
            took = {name: body[name] for name in ("temperature", "top_k", "top_p", "min_p")}
            with pytest.raises(Fault, match="repeat_penalty = 3"):
                engine.dialect.in_form({"generation_settings": {**took, "repeat_penalty": 3.0}}, body)
