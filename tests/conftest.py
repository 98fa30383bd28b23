"""Shared fixtures: the embedded real model, and tiny random models of every block shape."""

import allowed_skips
import pytest
import torch


def _refuse_skip(report):
    """On CI a skip that is not expected here fails the run: nothing may be green because it did not run."""
    if not report.skipped or hasattr(report, "wasxfail") or not allowed_skips.strict():
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not allowed_skips.allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, which is not expected here (tests/allowed_skips.py): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(scope="session")
def demo():
    import flowroutes_fast as fr

    return fr.load("demo")


def tiny(kind: str, **options):
    """A random fp32 model of two or three layers with odd sizes and biases that are not zero."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen2Config

    torch.manual_seed(0)
    grouped = {
        "hidden_size": 60,
        "intermediate_size": 77,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": (context := options.pop("max_position_embeddings", 64)),
    }
    config = {
        "llama": lambda: LlamaConfig(**grouped, attention_bias=True, **options),
        "mistral": lambda: MistralConfig(**grouped, head_dim=12, sliding_window=5, **options),
        "qwen2": lambda: Qwen2Config(**grouped, **options),
        "gpt2": lambda: GPT2Config(n_embd=60, n_layer=3, n_head=5, vocab_size=101, n_positions=context, **options),
        "neox": lambda: GPTNeoXConfig(
            **{k: v for k, v in grouped.items() if k != "num_key_value_heads"}, use_parallel_residual=True, **options
        ),
        "neox_sequential": lambda: GPTNeoXConfig(
            **{k: v for k, v in grouped.items() if k != "num_key_value_heads"}, use_parallel_residual=False, **options
        ),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() == 2:
                parameter.mul_(4)
    return model


KINDS = ("llama", "mistral", "qwen2", "gpt2", "neox", "neox_sequential")
IOI = "When Mary and John went to the store, John gave a drink to"


# those that take longest begin first: with `--dist loadfile` a long file that begins last keeps one process busy alone
LONGEST = (
    "test_estimate",
    "test_compile",
    "test_bench",
    "test_resume",
    "test_install",
    "test_corpus_ray",
    "test_corpus_faults",
    "test_docs",
    "test_kernels",
    "test_interrupt",
    "test_loading_faults",
    "test_streaming",
    "test_lazy",
)


def pytest_collection_modifyitems(items):
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
