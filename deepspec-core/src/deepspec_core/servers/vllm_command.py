"""The command that starts vLLM as a server of features: its options, and its environment.

Knows vLLM's options and the connector in in_vllm/; starts nothing. Written for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from deepspec_core.errors import ConfigError
from deepspec_core.features.served.layers import AskedLayers

# Positions beyond the longest text that a server needs for an answer with features: the token after it, those of steps
# that are under way by then, and the one that each of them guesses.
ROOM: Final = 4
# Alone in its folder, which becomes a place that vLLM's Python imports from.
CONNECTOR: Final = Path(__file__).parent / "in_vllm" / "deepspec_vllm_connector.py"
STORED: Final = ("float32", "bfloat16", "float8_e4m3")
_CONNECTOR_CLASS: Final = "DeepSpecHiddenStates"
# vLLM's options that are set here, and what sets them in place of the words behind `--`.
_SET: Final = {
    "--model": "the command's first argument",
    "--served-model-name": "the command's first argument",
    "--revision": "target.revision of the run file",
    "--trust-remote-code": "target.trust_remote_code of the run file",
    "--chat-template": "target.chat_template of the run file",
    "--host": "--host of deepspec serve",
    "--port": "--port of deepspec serve",
    "--api-key": "VLLM_API_KEY in the environment",
    "--dtype": "--dtype of deepspec serve",
    "--max-model-len": "--max-length of deepspec serve",
    "--speculative-config": "--layers of deepspec serve",
    "--spec-method": "--layers of deepspec serve",
    "--spec-model": "--layers of deepspec serve",
    "--spec-tokens": "--layers of deepspec serve",
    "--kv-transfer-config": "--exchange and --stored-as of deepspec serve",
}
_HTTP: Final = "deepspec serve reaches it over HTTP at --host and --port; a proxy can give it another entrance"
# Options that do not go with what is served, and why.
_NEVER: Final = {
    "--enable-prefix-caching": "a cached prefix would make features depend on what was asked before",
    "--enforce-eager": "it is set already, because graphs of decoding steps would be made for nothing",
    "--disable-uvicorn-access-log": "it is set already, because a line for every text would hide all others",
    "--config": "a file could set what deepspec serve sets; write its options behind --",
    "--headless": "such a server takes no requests; start it with `vllm serve`",
    "--grpc": _HTTP,
    "--uds": _HTTP,
    **dict.fromkeys(
        (
            "--ssl-keyfile",
            "--ssl-certfile",
            "--ssl-ca-certs",
            "--ssl-cert-reqs",
            "--ssl-ciphers",
            "--enable-ssl-refresh",
        ),
        _HTTP,
    ),
}
_GRAPHS: Final = "--no-enforce-eager"
_SHORT: Final = {"-sc": "--speculative-config"}


@frozen(kw_only=True)
class Served:
    """What is served, and how.

    target: A directory or a Hub id. `names`: how requests may call it.
    taps: The tapped layers, counted from 0; -1 is the embedding.
    dtype: What the target computes with. `stored_as`: what its states are written in; None: the same, and float32 where
        that is float16, which files do not have.
    max_length: Tokens of the longest conversation; None: as many as the target has positions.
    answers: Whether it also gives answers, each with its features (features/served/answered.py).
    extra: More of vLLM's own options.
    """

    target: str
    names: tuple[str, ...]
    taps: tuple[int, ...]
    num_layers: int
    max_positions: int
    exchange: Path
    dtype: str
    stored_as: str | None = None
    max_length: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    executable: str = "vllm"
    answers: bool = False
    extra: tuple[str, ...] = ()

    @property
    def layer_ids(self) -> list[int]:
        """The layers as vLLM numbers them (features/served/layers.py). Id i is the input of decoder layer i."""
        return list(AskedLayers(self.taps, self.num_layers).ids)

    @property
    def file_dtype(self) -> str:
        """What states are written in."""
        return self.stored_as or ("float32" if self.dtype == "float16" else self.dtype)

    @property
    def address(self) -> str:
        """Where this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"

    @property
    def address_elsewhere(self) -> str:
        """Where other machines reach the server, if they know this one by its name."""
        every = self.host in ("0.0.0.0", "::", "[::]")
        return f"http://{socket.gethostname()}:{self.port}" if every else self.address

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in ("localhost", "::1", "[::1]") or self.host.startswith("127.")

    @property
    def positions(self) -> int | None:
        """The positions of the longest text and of the token that every request generates; answers need more."""
        return None if self.max_length is None else self.max_length + (ROOM if self.answers else 1)


def command(served: Served) -> list[str]:
    """vLLM's command line. ConfigError if `extra` sets an option that this function sets."""
    for word in served.extra:
        # With answers there are decoding steps, and graphs of them may be of use.
        if not (served.answers and word == _GRAPHS):
            _refuse_own(word)
    layers = {"hf_config": {"eagle_aux_hidden_state_layer_ids": served.layer_ids}}
    speculative = {"method": "extract_hidden_states", "num_speculative_tokens": 1, "draft_model_config": layers}
    transfer = {
        "kv_connector": _CONNECTOR_CLASS,
        "kv_connector_module_path": CONNECTOR.stem,
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(served.exchange), "dtype": served.file_dtype},
    }
    words = [served.executable, "serve", served.target, "--served-model-name", *served.names]
    words += ["--host", served.host, "--port", str(served.port), "--dtype", served.dtype]
    if served.positions is not None:
        words += ["--max-model-len", str(served.positions)]
    if served.revision is not None:
        words += ["--revision", served.revision]
    if served.trust_remote_code:
        words += ["--trust-remote-code"]
    if served.chat_template is not None:
        words += ["--chat-template", str(served.chat_template)]
    # Without answers every request generates one token: graphs of decoding steps would be captured for nothing.
    words += ["--enforce-eager", "--no-enable-prefix-caching"]
    # Otherwise it writes a line for every text.
    words += ["--disable-uvicorn-access-log"]
    words += ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(transfer)]
    return [*words, *served.extra]


def variables(served: Served, before: Mapping[str, str]) -> dict[str, str]:
    """What the environment needs beside `before`, which it replaces in part."""
    places = [str(CONNECTOR.parent), *filter(None, [before.get("PYTHONPATH")])]
    found = {"PYTHONPATH": os.pathsep.join(places)}
    if "VLLM_NO_USAGE_STATS" not in before:
        found["VLLM_NO_USAGE_STATS"] = "1"
    if served.positions is not None and served.positions > served.max_positions:
        # The last position is that of the generated token, which nobody reads.
        found["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return found


def as_shell(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command as a shell reads it, an option a line."""
    lines: list[list[str]] = [[f"{name}={shlex.quote(value)}"] for name, value in environment.items()]
    begun = False
    for word in words:
        if not begun or word.startswith("--"):
            lines.append([])
            begun = True
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(" ".join(line) for line in lines)


def _refuse_own(word: str) -> None:
    """ConfigError for an option that is set here, or does not go with it: also where it is negated or abbreviated."""
    name = word.split("=")[0].split(".")[0].replace("_", "-")
    if not name.strip("-"):
        return
    if name.startswith("--"):
        # vLLM reads the beginning of an option as that option. No other option is the beginning of one of these.
        known = (*_SET, *_NEVER)
        asked = (name, name.replace("--no-", "--", 1))
        exact = [option for option in known if option in asked]
        meant = exact or [option for option in known if option.startswith(asked)]
    else:
        meant = [option for short, option in _SHORT.items() if name.startswith("-") and short.startswith(name)]
    if meant:
        option = meant[0]
        raise ConfigError(
            "deepspec serve sets this option of vLLM itself"
            if option in _SET
            else "This option of vLLM cannot be used with deepspec serve",
            where="the options after --",
            found=word if name.endswith(option[2:]) else f"{word}, which vLLM reads as {option}",
            expected="other options of `vllm serve`",
            fix=f"Leave it out; {_SET[option]} sets it." if option in _SET else f"Leave it out: {_NEVER[option]}.",
        )


def meant_layers(text: str) -> tuple[int, ...]:
    """Layers as a command line has them: "1,9,17". ConfigError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            "this is not a list of layers",
            where="--layers",
            found=repr(text),
            expected='whole numbers, such as "1,9,17"',
        ) from error
