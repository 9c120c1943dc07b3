"""llama.cpp's server from the package xllamacpp, which has it built: `python llama_cpp_server.py -m TARGET.gguf ...`.

Takes the options of `llama-server` that trials of drafts need, by the same names. Knows xllamacpp alone, so that it
runs in an environment which has nothing else.
"""

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", required=True, help="the target's GGUF file")
    parser.add_argument("-md", help="the draft's GGUF file")
    parser.add_argument("--spec-type", choices=("draft-dflash", "draft-dspark", "draft-eagle3"))
    parser.add_argument("--spec-draft-n-max", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--ctx-size", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--exact", action="store_true", help="caches in fp32, nothing kept between requests")
    options = parser.parse_args()
    server = xllamacpp.Server(parameters(options))
    print(f"serving at {server.listening_address}", flush=True)  # noqa: T201
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


def parameters(options: argparse.Namespace) -> xllamacpp.CommonParams:
    """The server's settings; one request at a time."""
    asked = xllamacpp.CommonParams()
    asked.model.path = options.m
    asked.hostnames, asked.port = [options.host], options.port
    asked.n_ctx, asked.n_parallel, asked.endpoint_metrics = options.ctx_size, 1, True
    # Otherwise it may change the context's length to what memory there is.
    asked.fit_params = False
    threads = [asked.cpuparams, asked.cpuparams_batch]
    if options.exact:
        asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        asked.cache_ram_mib = 0
    if options.md is not None:
        drafting = asked.speculative
        name = options.spec_type.upper().replace("-", "_")
        drafting.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{name}")]
        drafting.draft.mparams.path = options.md
        if options.spec_draft_n_max is not None:
            drafting.draft.n_max = options.spec_draft_n_max
        threads += [drafting.draft.cpuparams, drafting.draft.cpuparams_batch]
    for one in threads:
        one.n_threads = options.threads
    return asked


if __name__ == "__main__":
    main()
