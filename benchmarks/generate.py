"""Greedy generation: ours in floats and in int8, beside transformers on torch and CTranslate2.

\b
    python benchmarks/generate.py --ctranslate2 .venv-ct2
    python benchmarks/generate.py --sizes 70m --new-tokens 16 --repeats 1
    python benchmarks/generate.py --device gpu --sizes 70m,410m,1.4b

One random model of each size, random prompts of one length; no text ends before it is told to.
Every implementation has a process of its own. On a CPU all are pinned to the same cores and take
turns, one call each; on a GPU one process runs after the other, for each would take all memory.
There are medians, of calls for all new tokens and for one alone: between them lie the steps of
decoding, so `decode tokens/s` is of these, and `tokens/s` of the whole call, prompts included.
Models are loaded, and programs compiled, before the clock starts. Peak memory is that of the
process, imports and loading included (`at rest`: once the first call is over); on a GPU it is the
device's. CTranslate2's models are converted beforehand, in processes of their own.

Where a copy on the device has been timed, the bound is that every step reads all weights but the
embedding once: the share of it that was reached stands beside the tokens/s of one row.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from train_step import machine

OURS = {
    "ours, float32": {"folder": "float32", "dtype": "float32"},
    "ours, bfloat16": {"folder": "float32", "dtype": "bfloat16"},
    "ours, int8": {"folder": "int8", "dtype": "float32"},
    "ours, int8 x int8": {"folder": "dynamic", "dtype": "float32"},
}
"""What the table calls it: which folder it loads, and the dtype of what is not in int8."""
TORCH = {"transformers, float32": "float32", "transformers, bfloat16": "bfloat16"}
CTRANSLATE2 = {"CTranslate2, float32": "float32", "CTranslate2, int8": "int8"}
COLUMNS = ("tokens/s", "decode tokens/s", "first token s", "peak MiB", "at rest MiB")
AIMS = {"cpu": 1.5, "gpu": 2.0}
"""Ours, the fastest, over transformers, the fastest, in tokens/s."""
SHARE = 0.6
"""Of the memory-bandwidth bound at one row, on a GPU."""
Generate = Callable[[int, int], None]
"""(rows, new tokens): waits until the tokens are there."""


@dataclass(frozen=True)
class Endless:
    """A model whose texts do not end."""

    params: Any
    config: Any
    tokenizer: None = None
    eod: int = -1


def write_models(place: Path, size: str, prompt: int, rows: int) -> int:
    """`float32`, `int8`, `dynamic`, prompts.npy; bytes of the first's weights but the embedding."""
    import jax
    import numpy as np

    import pythia_jax as pj
    from pythia_jax import configs
    from pythia_jax.bridge.quantize import quantize
    from pythia_jax.model.parameters import count
    from pythia_jax.quickstart import train_tokenizer

    config = configs.from_dict({"model": {"size": size}}).model
    assert config is not None
    tokenizer = train_tokenizer(["a word or two of text"], 300).to_str().encode()
    params = pj.init_parameters(config, jax.random.key(0))
    pj.save_hf(pj.Model(params, config, {"tokenizer.json": tokenizer}), place / "float32")
    quantize(place / "float32", place / "int8", show_progress=False)
    quantize(place / "float32", place / "dynamic", activations="dynamic", show_progress=False)
    random = np.random.default_rng(0).integers(1, config.vocab_size, (rows, prompt))
    np.save(place / "prompts.npy", random)
    return 4 * (count(config) - config.vocab_size * config.hidden_size)


def ours(place: Path, name: str) -> Generate:
    import numpy as np

    import pythia_jax as pj

    how = OURS[name]
    loaded = pj.load(place / how["folder"], dtype=how["dtype"])
    model = Endless(loaded.params, loaded.config)
    prompts = np.load(place / "prompts.npy").tolist()

    def generate(rows: int, new: int) -> None:
        made = pj.generate(model, prompts[:rows], max_new_tokens=new, temperature=0.0)
        assert [len(tokens) for tokens in made] == [new] * rows

    return generate


def in_torch(place: Path, name: str, device: str) -> Generate:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    where = "cuda" if device == "gpu" else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        place / "float32", dtype=getattr(torch, TORCH[name])
    )
    model.to(where)
    model.generation_config.eos_token_id = None
    prompts = torch.from_numpy(np.load(place / "prompts.npy")).to(where)

    def generate(rows: int, new: int) -> None:
        with torch.inference_mode():
            made = model.generate(
                prompts[:rows],
                attention_mask=torch.ones_like(prompts[:rows]),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        assert made.cpu().shape == (rows, prompts.shape[1] + new)

    return generate


def convert(place: Path, name: str) -> None:
    """`ctranslate2-KIND` and words.json: with torch, so in a process that is not measured."""
    import ctranslate2  # type: ignore
    import numpy as np
    import transformers

    kind = CTRANSLATE2[name]
    converter = ctranslate2.converters.TransformersConverter(str(place / "float32"))
    converter.convert(str(place / f"ctranslate2-{kind}"), quantization=kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "float32")
    extra = len(tokenizer)  # the converter calls ids that the tokenizer does not know like this
    words = [
        [
            tokenizer.convert_ids_to_tokens(i) if i < extra else f"<extra_id_{i - extra}>"
            for i in row
        ]
        for row in np.load(place / "prompts.npy").tolist()
    ]
    (place / "words.json").write_text(json.dumps(words), "utf-8")


def in_ctranslate2(place: Path, name: str, device: str) -> Generate:
    sys.modules["torch"] = None  # type: ignore  # which it imports where it can
    import ctranslate2  # type: ignore

    kind = CTRANSLATE2[name]
    generator = ctranslate2.Generator(
        str(place / f"ctranslate2-{kind}"),
        device="cuda" if device == "gpu" else "cpu",
        compute_type=kind,
        inter_threads=1,
        intra_threads=len(os.sched_getaffinity(0)),
    )
    words = json.loads((place / "words.json").read_text("utf-8"))

    def generate(rows: int, new: int) -> None:
        made = generator.generate_batch(
            words[:rows],
            min_length=new,
            max_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        assert [len(result.sequences_ids[0]) for result in made] == [new] * rows

    return generate


def work(name: str, place: Path, device: str) -> None:
    """A worker: generates as each line on stdin says, `rows new-tokens`."""
    if name in OURS:
        generate = ours(place, name)
    else:
        generate = (in_torch if name in TORCH else in_ctranslate2)(place, name, device)
    for line in sys.stdin:
        rows, new = map(int, line.split())
        began = time.perf_counter()
        generate(rows, new)
        took = time.perf_counter() - began
        print("\n" + json.dumps({"took": took, **memory(name, device)}), flush=True)


def memory(name: str, device: str) -> dict[str, float]:
    """MiB at most so far, and now."""
    if device == "gpu":
        return {"peak MiB": _device_peak(name), "at rest MiB": float("nan")}
    unit = 1 if sys.platform == "darwin" else 1024  # there bytes, else kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return {"peak MiB": peak, "at rest MiB": float("nan")}
    return {"peak MiB": peak, "at rest MiB": pages * resource.getpagesize() / 2**20}


def _device_peak(name: str) -> float:
    if name in OURS:
        import jax

        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20
    if name in TORCH:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return float("nan")


def of_process(name: str, device: str) -> dict[str, str]:
    """The environment of a process of an implementation."""
    added = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda"}
    # What our environment finds by PYTHONPATH is not for theirs.
    added |= {"PYTHONPATH": ""} if name in CTRANSLATE2 else {}
    return {**os.environ, **added}


class Worker:
    def __init__(self, name: str, python: str, place: Path, device: str) -> None:
        self.name = name
        self.taken: dict[tuple[int, int], list[dict]] = {}
        command = [python, os.path.abspath(__file__), "--worker", name, "--place", str(place)]
        self.process = subprocess.Popen(
            [*command, "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=of_process(name, device),
        )

    def take(self, rows: int, new: int, *, keep: bool = True) -> None:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # told below
            self.process.stdin.write(f"{rows} {new}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"took"'):
                if keep:
                    self.taken.setdefault((rows, new), []).append(json.loads(line))
                return
        raise click.ClickException(f"{self.name} ended before its text was written")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def at_work(pythons: dict[str, str], place: Path, device: str) -> Iterator[list[Worker]]:
    workers = [Worker(name, python, place, device) for name, python in pythons.items()]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.end()


def measure(
    size: str,
    batches: list[int],
    prompt: int,
    new: int,
    repeats: int,
    pythons: dict[str, str],
    device: str,
) -> dict[str, Any]:
    """By batch and implementation: figures of the medians. And what `write_models` tells."""
    # The smallest first, for what memory was at its most is kept.
    calls = [(rows, length) for rows in sorted(batches) for length in (1, new)]
    taken: dict[str, dict[tuple[int, int], list[dict]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        written = subprocess.run(
            [
                *(sys.executable, os.path.abspath(__file__), "--place", str(place)),
                *("--write", f"{size} {prompt} {max(batches)}"),
            ],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in pythons.keys() & CTRANSLATE2.keys():
            command = [
                pythons[name],
                os.path.abspath(__file__),
                "--place",
                place,
                "--convert",
                name,
            ]
            quiet = {"env": of_process(name, "cpu"), "stdout": subprocess.DEVNULL}
            subprocess.run(command, check=True, **quiet)
        # On a GPU one after the other, else taking turns.
        groups = [[name] for name in pythons] if device == "gpu" else [list(pythons)]
        for group in groups:
            with at_work({name: pythons[name] for name in group}, place, device) as workers:
                for rows, length in calls:
                    for turn in range(1 + repeats):
                        for worker in workers:
                            worker.take(rows, length, keep=turn > 0)
                taken |= {worker.name: worker.taken for worker in workers}
    rows_of = {
        str(rows): {name: summary(found, rows, new) for name, found in taken.items()}
        for rows in batches
    }
    return {"batches": rows_of, "bytes": int(written.stdout.split()[-1])}


def summary(taken: dict[tuple[int, int], list[dict]], rows: int, new: int) -> dict[str, float]:
    whole, first = (
        statistics.median(one["took"] for one in taken[rows, length]) for length in (new, 1)
    )
    last = taken[rows, new][-1]
    return {
        "tokens/s": rows * new / whole,
        "decode tokens/s": rows * (new - 1) / max(whole - first, 1e-9),
        "first token s": first,
        "peak MiB": last["peak MiB"],
        "at rest MiB": last["at rest MiB"],
    }


def bandwidth() -> float:
    """Bytes a second of a copy on the device, reads and writes together."""
    code = (
        "import jax, jax.numpy as jnp, time\n"
        "x = jnp.ones(1 << 28); f = jax.jit(lambda x: x + 1); f(x).block_until_ready()\n"
        "took = []\n"
        "for _ in range(20):\n"
        "    began = time.perf_counter(); f(x).block_until_ready()\n"
        "    took.append(time.perf_counter() - began)\n"
        "print(2 * x.nbytes / min(took))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def best(rows: dict[str, dict[str, float]], of: dict[str, Any]) -> float:
    return max((row["tokens/s"] for name, row in rows.items() if name in of), default=0.0)


def table(measured: dict[str, Any], copied: float | None) -> str:
    columns = " | ".join((*COLUMNS, "of transformers", "of the bound"))
    lines = [
        f"| size | rows | implementation | {columns} |",
        "| --- | --: | --- | " + "--: | " * (len(COLUMNS) + 1) + "--: |",
    ]
    for size, found in measured.items():
        for batch, rows in found["batches"].items():
            peer = best(rows, TORCH)
            for name, row in rows.items():
                cells = [
                    f"{row[c]:.3f}" if c == "first token s" else f"{row[c]:.0f}" for c in COLUMNS
                ]
                cells.append(f"{row['tokens/s'] / peer:.2f}" if peer else "")
                share = share_of_bound(found["bytes"], batch, name, row, copied)
                cells.append("" if share is None else f"{share:.2f}")
                lines.append(f"| {size} | {batch} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_of_bound(
    whole: int, batch: str, name: str, row: dict[str, float], copied: float | None
) -> float | None:
    """Of the steps that the bandwidth allows at one row. whole: bytes of weights in float32."""
    if copied is None or batch != "1":
        return None
    width = {"bfloat16": 2, "int8": 1}.get(name.split(" x ")[0].split(", ")[1], 4)
    return row["decode tokens/s"] / (copied / (whole * width / 4))


def verdict(measured: dict[str, Any], device: str, copied: float | None) -> str:
    lines = []
    for size, found in measured.items():
        for batch, rows in found["batches"].items():
            if not (theirs := best(rows, TORCH)):
                continue
            mine, own = best(rows, OURS), {n: row for n, row in rows.items() if n in OURS}
            line = f"{size}, {batch} rows: ours, the fastest, {mine / theirs:.2f} times "
            line += f"transformers (aim: {AIMS[device]:g})"
            for dtype in ("float32", "bfloat16"):
                pair = [rows.get(f"{whose}, {dtype}") for whose in ("ours", "transformers")]
                if pair[0] and pair[1]:
                    share = pair[0]["tokens/s"] / pair[1]["tokens/s"]
                    line += f"; in {dtype} both, {share:.2f} times"
            in_int8 = best({name: own[name] for name in own if "int8" in name}, OURS)
            if in_int8 and "CTranslate2, int8" in rows:
                other = rows["CTranslate2, int8"]["tokens/s"]
                line += f"; ours in int8 {in_int8 / other:.2f} times CTranslate2's int8"
            shares = [share_of_bound(found["bytes"], batch, *pair, copied) for pair in own.items()]
            if known := [share for share in shares if share is not None]:
                line += f"; up to {max(known):.2f} of the memory-bandwidth bound (aim: {SHARE:g})"
            lines.append(line)
    return "\n".join(lines)


def ctranslate2_version(venv: Path | None) -> str:
    if venv is None:
        return ""
    code = "from importlib.metadata import version as v; print(v('ctranslate2'))"
    done = subprocess.run(
        [venv / "bin" / "python", "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    return f", ctranslate2 {done.stdout.strip()}"


@click.command(help=__doc__)
@click.option("--sizes", default="70m,410m", show_default=True)
@click.option("--batches", default="1,16", show_default=True, help="rows generated together")
@click.option("--prompt", default=128, show_default=True, help="tokens of each prompt")
@click.option("--new-tokens", default=128, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="timed calls of each")
@click.option("--cores", default=2, show_default=True, help="CPU cores to pin all of them to")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True)
@click.option(
    "--only", multiple=True, type=click.Choice([*OURS, *TORCH, *CTRANSLATE2]), help="may repeat"
)
@click.option("--ctranslate2", type=click.Path(path_type=Path), help="environment that has it")
@click.option("--out", type=click.Path(path_type=Path), help="also write .json, or .md as printed")
@click.option("--worker", hidden=True)
@click.option("--write", hidden=True)
@click.option("--convert", "converted", hidden=True)
@click.option("--place", type=click.Path(path_type=Path), hidden=True)
def main(
    sizes: str,
    batches: str,
    prompt: int,
    new_tokens: int,
    repeats: int,
    cores: int,
    device: str,
    only: tuple[str, ...],
    ctranslate2: Path | None,
    out: Path | None,
    worker: str | None,
    write: str | None,
    converted: str | None,
    place: Path | None,
) -> None:
    if worker:
        assert place is not None
        work(worker, place, device)
        return
    if write:
        assert place is not None
        size, length, rows = write.split()
        click.echo(write_models(place, size, int(length), int(rows)))
        return
    if converted:
        assert place is not None
        convert(place, converted)
        return
    if new_tokens < 2:
        raise click.BadParameter("--new-tokens: at least 2, or there is no step to time")
    pythons = dict.fromkeys((*OURS, *TORCH), sys.executable)
    if ctranslate2 is not None:
        python = ctranslate2 / "bin" / "python"
        if not python.exists():
            raise click.BadParameter(f"--ctranslate2 {ctranslate2}: there is no environment")
        pythons |= dict.fromkeys(CTRANSLATE2, os.path.abspath(python))
    pythons = {name: python for name, python in pythons.items() if not only or name in only}
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    os.sched_setaffinity(0, allowed)
    copied = bandwidth() if device == "gpu" else None
    head = f"{machine(len(allowed))}{ctranslate2_version(ctranslate2)}; {device}"
    head += f"; prompts of {prompt} tokens, {new_tokens} new"
    head += "" if copied is None else f"; a copy on the device: {copied / 1e9:.0f} GB/s"
    click.echo(head, err=True)
    measured = {}
    for size in sizes.split(","):
        click.echo(f"{size} …", err=True)
        numbers = [int(batch) for batch in batches.split(",")]
        measured[size] = measure(size, numbers, prompt, new_tokens, repeats, pythons, device)
    text = f"{head}; medians of {repeats}\n\n{table(measured, copied)}\n\n"
    text += verdict(measured, device, copied) + "\n"
    click.echo(text)
    if out:
        result = {"machine": head, "measured": measured, "copy": copied}
        out.write_text(json.dumps(result, indent=1) if out.suffix == ".json" else text, "utf-8")
        click.echo(f"written to {out}", err=True)


if __name__ == "__main__":
    main()
