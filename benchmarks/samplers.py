r"""What `benchmarks.sampling` compares with: how each engine is asked for the same completions.

OpenVINO and llama.cpp read models of their own formats, converted from the Hugging Face folder:

    optimum-cli export openvino --model <folder> --task text-generation-with-past \
        --weight-format fp32 <openvino>
    python convert_hf_to_gguf.py <folder> --outtype bf16 --outfile <gguf>

the first of optimum-intel, the second of llama.cpp's sources.
"""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from benchmarks import contest
from benchmarks.contest import Contender

TEMPERATURE = 0.7
CACHE_GB = 2  # of keys and values, for engines that want to be told


def prompts(args: Namespace) -> tuple[list[list[int]], int | None]:
    """What the peers read, and the token at which they stop."""
    from gsm_verifier.model import hf

    tokenizer = hf.read_tokenizer(args.model)
    ids = [tokenizer.question(p.question) for p in contest.questions(args)]
    return ids, tokenizer.end if args.real else None


def transformers(args: Namespace) -> Callable[[], dict[str, Any]]:
    """`generate`, question by question: all at one time take more memory and no less time."""
    import torch

    ids, end = prompts(args)
    model = contest.torch_model(args).eval()
    model.generation_config.eos_token_id = end

    def sample() -> dict[str, Any]:
        found = []
        for prompt in ids:
            row = torch.tensor([prompt])
            out = model.generate(
                row,
                attention_mask=torch.ones_like(row),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                num_return_sequences=args.completions,
                max_new_tokens=args.tokens,
                pad_token_id=0,
            )[:, len(prompt) :]
            found.append([_until(completion, end) for completion in out.tolist()])
        return {"completions": found}

    return sample


def _until(tokens: list[int], end: int | None) -> list[int]:
    """A completion without the padding after its end."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def vllm(args: Namespace) -> Callable[[], dict[str, Any]]:
    """vLLM, all questions at one time."""
    import os

    # In this process, so that its memory is counted, and on the same cores as the others.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, range(args.threads)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CACHE_GB))
    from vllm import LLM, SamplingParams

    ids, end = prompts(args)
    model = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=max(map(len, ids)) + args.tokens,
        max_num_seqs=max(256, args.completions),
        generation_config="vllm",
        disable_log_stats=True,
    )
    params = SamplingParams(
        n=args.completions,
        temperature=TEMPERATURE,
        max_tokens=args.tokens,
        ignore_eos=end is None,
        stop_token_ids=None if end is None else [end],
        detokenize=False,
    )

    def sample() -> dict[str, Any]:
        model.reset_prefix_cache()
        requests = [{"prompt_token_ids": prompt} for prompt in ids]
        found = model.generate(requests, params, use_tqdm=False)
        return {"completions": [[list(c.token_ids) for c in r.outputs] for r in found]}

    return sample


def openvino(args: Namespace) -> Callable[[], dict[str, Any]]:
    """OpenVINO GenAI, all questions at one time."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    ids, end = prompts(args)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = CACHE_GB, max(256, args.completions)
    precision = {"float32": "f32", "bfloat16": "bf16"}[args.dtype]
    hints = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    hints |= {"INFERENCE_NUM_THREADS": args.threads}
    pipeline = genai.ContinuousBatchingPipeline(args.openvino, scheduler, "CPU", hints)
    config = genai.GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        num_return_sequences=args.completions,
        max_new_tokens=args.tokens,
        ignore_eos=end is None,
        stop_token_ids=set() if end is None else {end},
    )

    def sample() -> dict[str, Any]:
        config.rng_seed += 1
        tensors = [ov.Tensor(np.array([prompt], np.int64)) for prompt in ids]
        found = pipeline.generate(tensors, [config] * len(tensors))
        return {"completions": [result.m_generation_ids for result in found]}

    return sample


def llama_cpp(args: Namespace) -> Callable[[], dict[str, Any]]:
    """llama.cpp, question by question: a prompt is read once, its completions are one batch."""
    import llama_cpp as cpp

    ids, end = prompts(args)
    quiet = cpp.llama_log_callback(lambda level, text, data: None)
    cpp.llama_log_set(quiet, None)
    cpp.llama_backend_init()
    model = cpp.llama_model_load_from_file(args.gguf.encode(), cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"{args.gguf}: llama.cpp doesn't read it")
    chains = []
    for n in range(args.completions):
        chains.append(cpp.llama_sampler_chain_init(cpp.llama_sampler_chain_default_params()))
        cpp.llama_sampler_chain_add(chains[-1], cpp.llama_sampler_init_temp(TEMPERATURE))
        cpp.llama_sampler_chain_add(chains[-1], cpp.llama_sampler_init_dist(n + 1))
    most = max(512, args.completions)  # tokens of a batch
    params = cpp.llama_context_default_params()
    params.n_ctx = (max(map(len, ids)) + args.tokens) * args.completions
    params.n_batch = params.n_ubatch = most
    params.n_seq_max = args.completions
    params.n_threads = params.n_threads_batch = args.threads
    types = {"float32": 0, "bfloat16": 30}  # of ggml
    params.type_k = params.type_v = types[args.dtype]
    context = cpp.llama_init_from_model(model, params)
    memory, batch = cpp.llama_get_memory(context), cpp.llama_batch_init(most, 0, 1)

    def read(tokens: list[int], positions: list[int], sequences: list[int], logits: bool) -> None:
        batch.n_tokens = len(tokens)
        for i, row in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = row
            batch.n_seq_id[i], batch.logits[i] = 1, logits
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def complete(prompt: list[int]) -> list[list[int]]:
        cpp.llama_memory_clear(memory, True)
        *first, last = prompt
        read(first, list(range(len(first))), [0] * len(first), False)
        for n in range(1, args.completions):
            cpp.llama_memory_seq_cp(memory, 0, n, -1, -1)
        found: list[list[int]] = [[] for _ in range(args.completions)]
        running = list(range(args.completions))
        for step in range(args.tokens):
            tokens = [found[n][-1] if step else last for n in running]
            read(tokens, [len(first) + step] * len(running), running, True)
            for i, n in enumerate(running):
                found[n].append(cpp.llama_sampler_sample(chains[n], context, i))
            running = [n for n in running if found[n][-1] != end]
            if not running:
                break
        return found

    def sample() -> dict[str, Any]:
        assert quiet  # which llama.cpp calls: it must live as long as this
        return {"completions": [complete(prompt) for prompt in ids]}

    return sample


PEERS = {
    "transformers": Contender(transformers, needs=("torch", "transformers")),
    "vllm": Contender(vllm, needs=("vllm",)),
    "openvino": Contender(openvino, needs=("openvino_genai",), option="openvino"),
    "llama_cpp": Contender(llama_cpp, needs=("llama_cpp",), option="gguf"),
}
