"""What servers count: the text of /metrics in each engine's form, two readings as a difference, rounds in answers."""

from typing import Any

import pytest
from attrs import evolve

from deepspec_core.decoding.engine import Completion
from deepspec_core.evaluation.served import figures
from deepspec_core.evaluation.server_report import of_server
from deepspec_core.servers.connection import Fault
from deepspec_core.servers.counting import Impossible, NoCounters, Reading, Reset, Tally, impossible, reading
from deepspec_core.servers.engines import LLAMA_CPP, VLLM, SGLang, engine_of
from deepspec_core.servers.measuring import Measured

LABELS = 'engine="0",model_name="a } b \\" 7"'
VLLM_TEXT = f"""# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{{LABELS}}} 1.2e+02
vllm:generation_tokens_total{{engine="1"}} 5.0
vllm:num_requests_running{{{LABELS}}} 2.0
vllm:spec_decode_num_drafts_total{{{LABELS}}} 30.0
vllm:spec_decode_num_draft_tokens_total{{{LABELS}}} 90.0
vllm:spec_decode_num_accepted_tokens_total{{{LABELS}}} 45.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{LABELS},position="0"}} 25.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{LABELS},position="2"}} 5.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{LABELS},position="1"}} 15.0
process_start_time_seconds 1.7e+09
nothing:here NaN
"""


def test_text_becomes_numbers_whatever_labels_hold() -> None:
    tally = Tally(rounds=30, proposed=90, accepted=45, accepted_at=(25, 15, 5))
    expected = Reading(generated=125, running=2, tally=tally, started=1.7e9)
    assert reading(VLLM_TEXT, VLLM.counters) == expected


def test_without_speculation_there_is_no_tally_and_without_tokens_nothing() -> None:
    text = "\n".join(line for line in VLLM_TEXT.splitlines() if "spec_decode" not in line)
    assert reading(text, VLLM.counters).tally is None
    for foreign in (VLLM_TEXT, "<html><body>1 2</body></html>", ""):
        with pytest.raises(NoCounters):
            reading(foreign, LLAMA_CPP.counters)


def test_a_difference_is_what_was_counted_in_between() -> None:
    before = reading(VLLM_TEXT, VLLM.counters)
    none_yet = Reading(generated=100, running=0, tally=Tally(rounds=10, proposed=30, accepted=15), started=1.7e9)
    tally = before.since(none_yet).tally
    # llama.cpp has no counts by position before the first of them.
    assert tally == Tally(rounds=20, proposed=60, accepted=30, accepted_at=(25, 15, 5))
    assert before.since(before).generated == 0


@pytest.mark.parametrize("change", [{"generated": 126}, {"started": 1.8e9}, {"tally": Tally(rounds=31, accepted=45)}])
def test_counters_that_fall_and_other_processes_are_a_reset(change: dict[str, Any]) -> None:
    now = reading(VLLM_TEXT, VLLM.counters)
    values = {"generated": now.generated, "running": 0, "tally": now.tally, "started": now.started}
    with pytest.raises(Reset):
        now.since(Reading(**{**values, **change}))


def test_sglang_tells_rounds_by_old_and_new_names() -> None:
    old = {"spec_verify_ct": 4, "spec_accept_histogram": [1, 2, 1], "spec_accept_token_num": 4}
    new = {"spec_verify_ct": 4, "spec_correct_drafts_histogram": [1, 2, 1], "spec_num_proposed_drafts": 8}
    both = [SGLang().tally({"meta_info": meta}) for meta in (old, new)]
    assert both[0] == Tally(rounds=4, accepted=4, accepted_at=(3, 1))
    assert both[1] == Tally(rounds=4, accepted=4, proposed=8, accepted_at=(3, 1))
    assert SGLang().tally({"meta_info": {"completion_tokens": 3}}) is None
    bare = SGLang().tally({"meta_info": {"spec_verify_ct": 4, "spec_accept_token_num": 4}})
    assert bare == Tally(rounds=4, accepted=4)
    assert both[1].plus(bare) == Tally(rounds=8, accepted=8)


def test_sglang_may_say_no_more_than_that_there_was_no_round() -> None:
    none = SGLang().tally({"meta_info": {"spec_verify_ct": 0}})
    assert none == Tally(rounds=0, accepted=0, proposed=0, accepted_at=())
    some = Tally(rounds=4, accepted=4, proposed=8, accepted_at=(3, 1))
    assert some.plus(none) == none.plus(some) == some


@pytest.mark.parametrize(
    "change", [{"spec_accept_token_num": 5}, {"spec_verify_ct": 5}, {"spec_accept_histogram": "x"}]
)
def test_numbers_that_contradict_each_other_are_a_fault(change: dict[str, Any]) -> None:
    meta = {"spec_verify_ct": 4, "spec_accept_histogram": [1, 2, 1]} | change
    with pytest.raises(Fault):
        SGLang().tally({"meta_info": meta})


def test_llama_cpp_may_not_sample_otherwise_than_it_was_asked() -> None:
    dialect = LLAMA_CPP.dialect
    body = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.05}
    answer = {"content": "a", "tokens": [7], "stop_type": "limit", "tokens_predicted": 1, "tokens_evaluated": 2}
    # It keeps numbers in single precision.
    said = {**body, "temperature": 0.699999988079071, "min_p": 0.05000000074505806}
    found = dialect.in_form({**answer, "generation_settings": said}, body)
    assert found["choices"] == [{"text": "a", "finish_reason": "length", "token_ids": [7]}]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 1}
    with pytest.raises(Fault, match="top_k = 40"):
        dialect.in_form({**answer, "generation_settings": {**said, "top_k": 40}}, body)


def test_an_engine_is_told_by_its_list_of_models() -> None:
    assert engine_of([{"id": "m", "owned_by": "llamacpp"}]) is LLAMA_CPP
    assert engine_of([{"id": "m", "owned_by": "openai"}]) is None
    assert engine_of([]) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"accepted": 4000}, "4,000 accepted tokens of 90 proposed"),
        ({"accepted": -7}, "-7 accepted tokens"),
        ({"accepted": 10**5000, "proposed": None}, "more than 9,007,199,254,740,992 accepted tokens"),
        ({"rounds": -1, "accepted_at": None}, "-1 rounds"),
        ({"rounds": 0, "accepted_at": None}, "90 tokens in 0 rounds"),
        ({"accepted_at": (15, 25, 5)}, "30 rounds, which accepted by position 15, 25, 5"),
        ({"accepted_at": (31, 9, 5)}, "30 rounds, which accepted by position 31, 9, 5"),
        ({"accepted_at": (25, 15, 0)}, "45 accepted tokens, and 40 by position"),
        ({"accepted_at": (25, 15, 6)}, "45 accepted tokens, and 46 by position"),
    ],
)
def test_counts_that_cannot_be_are_said_with_their_numbers(change: dict[str, Any], why: str) -> None:
    tally = Tally(rounds=30, proposed=90, accepted=45, accepted_at=(25, 15, 5))
    assert impossible(tally, at_least=75) is None
    assert "for 76 tokens" in (impossible(tally, at_least=76) or "")
    # Counts by position may end before the longest proposal does.
    assert impossible(evolve(tally, accepted_at=(25, 15))) is None
    assert impossible(evolve(tally, **change)) == why


@pytest.mark.parametrize(
    "line",
    [
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="99999999999"} 1',
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="{"9" * 5000}"}} 1',
        "\n".join(f'vllm:generation_tokens_total{{e="{k}"}} 1e308' for k in range(2)),
        "vllm:generation_tokens_total -3",
    ],
)
def test_lines_beyond_all_bounds_are_refused(line: str) -> None:
    with pytest.raises(Impossible, match="vllm:"):
        reading(f"{VLLM_TEXT}{line}\n", VLLM.counters)


def test_tokens_that_no_counted_round_gave_are_told() -> None:
    """vLLM and llama.cpp count no step without a proposal, so 2 rounds can stand beside 20 tokens."""
    answer = Completion(id="a", prompt_ids=(1,), output_ids=tuple(range(20)), finish_reason="length", rounds=())
    measured = Measured(
        completions=(answer,),
        wall=1.0,
        tally=Tally(rounds=2, proposed=4, accepted=2, accepted_at=(2, 0)),
        speculates=True,
        counted=20,
        by_counters=20,
        running_before=0,
        mismatched=0,
    )
    result = figures(measured)
    assert result["counted"]["tokens_beside_rounds"] == 15
    assert any("at least 15 tokens of the answers came in steps" in line for line in of_server(result))
