"""The logit lens and the tuned lens against torch, and the commands that read and fit them."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from interp_runs import run_config
from on_a_mesh import on_eight_devices
from reference import TINY, distance, hf_model, random_params, random_tokens
from torch.nn import functional

import pythia_jax as pj
from pythia_jax import configs
from pythia_jax.bridge.model import Model
from pythia_jax.cli.lens import lens as command
from pythia_jax.configs import Runtime
from pythia_jax.data import batches
from pythia_jax.interp import lens_reading, preflight, tuned_lens
from pythia_jax.interp.lens_fitting import fit_of
from pythia_jax.interp.lenses import TunedLens, lens_losses, logit_lens
from pythia_jax.training.trainer import train

CONFIG = replace(TINY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)
BATCH, SEQ = 3, 7
PARAMS = random_params(CONFIG)
TOKENS = random_tokens(CONFIG, BATCH, SEQ + 1)
CHUNKED = Runtime(loss_chunk=2 * BATCH)  # two positions at a time, and one is left over


def some_lens(seed=0):
    rng = np.random.default_rng(seed)
    layers, hidden = CONFIG.num_hidden_layers, CONFIG.hidden_size
    kernel = 0.1 * rng.standard_normal((layers, hidden, hidden))
    return TunedLens(kernel.astype(np.float32), rng.standard_normal((layers, hidden), np.float32))


def in_torch(tokens, lens=None):
    """Logits of each lens by transformers' hidden states, final norm and unembedding."""
    model = hf_model(PARAMS, CONFIG)
    with torch.no_grad():
        out = model(torch.tensor(tokens).long(), use_cache=False, output_hidden_states=True)
        streams = list(out.hidden_states[:-1])
        for layer, h in enumerate(streams):
            if lens is not None:
                kernel, bias = (torch.tensor(np.asarray(x[layer])) for x in lens)
                streams[layer] = h + h @ kernel + bias
        read = [model.lm_head(model.gpt_neox.final_layer_norm(h)) for h in streams]
        return torch.stack([*read, out.logits])


def test_each_lens_is_transformers_stream_through_its_head():
    logits = logit_lens(PARAMS, TOKENS, CONFIG)
    expected = in_torch(TOKENS).numpy()
    assert logits.shape == expected.shape == (3, BATCH, SEQ + 1, 61)
    for ours, reference in zip(logits, expected, strict=True):
        assert distance(ours, reference) <= 1e-5
    own = pj.forward(PARAMS, TOKENS, CONFIG)
    np.testing.assert_allclose(logits[-1], own, rtol=0, atol=1e-6)


def test_the_likeliest_tokens_are_those_of_all_logits_and_layers_come_as_asked():
    logits = np.asarray(jax.nn.log_softmax(logit_lens(PARAMS, TOKENS, CONFIG)))
    ids, found = logit_lens(PARAMS, TOKENS, CONFIG, layers=[2, 0], top=4, runtime=CHUNKED)
    expected = logits[[2, 0]]
    order = np.argsort(-expected, axis=-1)[..., :4]
    np.testing.assert_array_equal(ids, order)
    picked = np.take_along_axis(expected, order, axis=-1)
    np.testing.assert_allclose(found, picked, rtol=0, atol=1e-5)
    (last,) = jax.jit(lambda p, t: logit_lens(p, t, CONFIG, layers=[2]))(PARAMS, TOKENS)
    np.testing.assert_allclose(last, pj.forward(PARAMS, TOKENS, CONFIG), rtol=0, atol=1e-5)


def test_the_likeliest_tokens_never_need_all_logits():
    config = replace(CONFIG, vocab_size=4096)
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    params = jax.eval_shape(lambda: random_params(config))

    def held(runtime):
        program = jax.jit(lambda p, t: logit_lens(p, t, config, top=2, runtime=runtime))
        memory = program.lower(params, tokens).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    everything = 3 * 4 * 64 * 4096 * 4
    assert held(Runtime(loss_chunk=16)) < everything / 4


def test_a_tuned_lens_moves_the_stream_before_the_head():
    lens = some_lens()
    logits = tuned_lens.apply(lens, PARAMS, TOKENS, CONFIG)
    for ours, reference in zip(logits, in_torch(TOKENS, lens).numpy(), strict=True):
        assert distance(ours, reference) <= 1e-5
    chosen = tuned_lens.apply(lens, PARAMS, TOKENS, CONFIG, layers=[1])
    np.testing.assert_allclose(chosen[0], logits[1], rtol=0, atol=1e-5)
    unmoved = tuned_lens.apply(tuned_lens.identity(CONFIG), PARAMS, TOKENS, CONFIG)
    np.testing.assert_allclose(unmoved, logit_lens(PARAMS, TOKENS, CONFIG), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lens", [None, some_lens()], ids=["logit", "tuned"])
def test_losses_divergence_and_agreement_are_torchs(lens):
    said = in_torch(TOKENS[:, :-1], lens).log_softmax(-1)
    labels = torch.tensor(TOKENS[:, 1:]).long()
    loss = torch.stack([functional.nll_loss(x.mT, labels, reduction="none") for x in said])
    kl = functional.kl_div(said, said[-1].expand_as(said), reduction="none", log_target=True)
    agree = (said.argmax(-1) == said[-1].argmax(-1)).float()
    found = lens_losses(PARAMS, TOKENS, CONFIG, lens=lens, runtime=CHUNKED)
    np.testing.assert_allclose(found.loss, loss.mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found.kl, kl.sum(-1).mean(-1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.agreement, agree.mean(-1), rtol=0, atol=1e-6)
    assert found.kl[:-1].min() > 1e-3  # there is something to diverge
    in_bits = found.bits_per_byte(SEQ, np.array([10, 20, 30]))
    np.testing.assert_allclose(in_bits, loss.sum((1, 2)) / 60 / math.log(2), rtol=1e-5)


def by_torch(steps, rows):
    """Two updates of torch's SGD as the paper's package makes it, one optimizer a layer."""
    model = hf_model(PARAMS, CONFIG)
    layers, hidden = CONFIG.num_hidden_layers, CONFIG.hidden_size
    moves = [torch.nn.Linear(hidden, hidden) for _ in range(layers)]
    for parameter in (p for move in moves for p in move.parameters()):
        torch.nn.init.zeros_(parameter)
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        for m in moves
    ]
    for step, tokens in enumerate(rows):
        with torch.no_grad():
            out = model(torch.tensor(tokens).long(), use_cache=False, output_hidden_states=True)
        own = out.logits.log_softmax(-1)
        for move, optimizer, h in zip(moves, optimizers, out.hidden_states[:-1], strict=True):
            said = model.lm_head(model.gpt_neox.final_layer_norm(h + move(h))).log_softmax(-1)
            optimizer.zero_grad()
            (own.exp() * (own - said)).sum(-1).mean().backward()
            torch.nn.utils.clip_grad_norm_(move.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
            optimizer.step()
    return (
        torch.stack([m.weight.detach().T for m in moves]),
        torch.stack([m.bias.detach() for m in moves]),
    )


def test_updates_are_those_of_torchs_optimizer_whatever_is_computed_together():
    rows = [random_tokens(CONFIG, 5, SEQ, seed) for seed in (1, 2)]
    kernel, bias = by_torch(2, rows)
    lens = tuned_lens.fit(
        PARAMS, iter(rows), CONFIG, steps=2, rows=2, show_progress=False, runtime=CHUNKED
    )
    assert distance(lens.kernel, kernel) <= 1e-4 and distance(lens.bias, bias) <= 1e-4
    whole = tuned_lens.fit(PARAMS, rows, CONFIG, rows=5, show_progress=False)
    assert distance(whole.kernel, lens.kernel) <= 1e-5


def test_fitting_goes_on_from_a_start_and_leaves_it_as_it_is():
    rows, start = [random_tokens(CONFIG, 2, SEQ)], some_lens()
    kept = jax.tree.map(jnp.array, start)
    first = tuned_lens.fit(PARAMS, rows, CONFIG, start=kept, show_progress=False)
    np.testing.assert_array_equal(kept.kernel, start.kernel)
    assert 0 < distance(first.kernel, start.kernel) < 0.2


def test_rows_that_do_not_fit_are_refused_with_the_numbers(monkeypatch):
    size = sum(x.nbytes for x in tuned_lens.identity(CONFIG))
    monkeypatch.setattr(preflight, "host_memory", lambda: size)
    told = f"fitting a lens to 2 rows at a time takes .* {preflight.in_bytes(size)} are free; take"
    with pytest.raises(MemoryError, match=told):
        tuned_lens.fit(PARAMS, [TOKENS[:2]], CONFIG, rows=2, show_progress=False)


def test_bad_input_is_one_clear_error():
    with pytest.raises(ValueError, match="there is no lens 3; lenses are 0 to 2"):
        logit_lens(PARAMS, TOKENS, CONFIG, layers=[0, 3])
    with pytest.raises(ValueError, match="name each lens once"):
        logit_lens(PARAMS, TOKENS, CONFIG, layers=[])
    with pytest.raises(ValueError, match="top 62: from 1 to 61"):
        logit_lens(PARAMS, TOKENS, CONFIG, top=62)
    with pytest.raises(ValueError, match="token 61 is not in the vocabulary"):
        lens_losses(PARAMS, np.full((1, 3), 61), CONFIG)
    with pytest.raises(ValueError, match=r"this model has 2 layers of 32, and wants \(2, 32, 32\)"):
        tuned_lens.apply(TunedLens(*(x[:1] for x in some_lens())), PARAMS, TOKENS, CONFIG)
    with pytest.raises(ValueError, match="batches: 1 were given, and 2 wanted"):
        tuned_lens.fit(PARAMS, iter([TOKENS]), CONFIG, steps=2, show_progress=False)
    with pytest.raises(ValueError, match="batches have no length: say how many"):
        tuned_lens.fit(PARAMS, iter([TOKENS]), CONFIG, show_progress=False)
    with pytest.raises(ValueError, match=r"batch 1 is of shape \(3, 5\), and others \(3, 8\)"):
        tuned_lens.fit(PARAMS, [TOKENS, TOKENS[:, :5]], CONFIG, show_progress=False)


def test_what_is_not_finite_names_the_row():
    table = PARAMS["embed_in"]["embedding"].at[60].set(np.nan)
    broken = {**PARAMS, "embed_in": {"embedding": table}}
    tokens = np.where(TOKENS == 60, 0, TOKENS)
    tokens[1, 2] = 60
    for found in (
        lambda: logit_lens(broken, tokens, CONFIG, top=1),
        lambda: lens_losses(broken, tokens, CONFIG),
    ):
        with pytest.raises(ValueError, match="row 1: what a lens reads there is not finite"):
            found()
    with pytest.raises(ValueError, match="update 0: the divergence of row 1 at layer 0"):
        tuned_lens.fit(broken, [tokens], CONFIG, rows=2, show_progress=False)


@pytest.mark.slow
def test_eight_devices_find_what_one_does():
    script = Path(__file__).with_name("lenses_on_a_mesh.py")
    found = on_eight_devices(script, x64=True)
    assert max(found.values()) <= 1e-9, found


# Files


def test_a_saved_lens_comes_back_with_what_it_is_of(tmp_path):
    path, lens = tmp_path / "lens.safetensors", some_lens()
    tuned_lens.save(lens, path, {"source": "a model", "step": "3"})
    back = tuned_lens.load(path, CONFIG)
    np.testing.assert_array_equal(back.kernel, lens.kernel)
    np.testing.assert_array_equal(back.bias, lens.bias)
    assert tuned_lens.about(path) == {"source": "a model", "step": "3"}
    with pytest.raises(ValueError, match="this model has 3 layers"):
        tuned_lens.load(path, replace(CONFIG, num_hidden_layers=3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="by its header"):
        tuned_lens.load(path, CONFIG)


def package_folder(folder, lens, drop=(), **changes):
    """As the package tuned-lens saves: the state of an nn.ModuleList of nn.Linear."""
    hidden = CONFIG.hidden_size
    modules = torch.nn.ModuleList([torch.nn.Linear(hidden, hidden) for _ in lens.bias])
    with torch.no_grad():
        for module, kernel, bias in zip(modules, *lens, strict=True):
            module.weight.copy_(torch.tensor(kernel).T)  # type: ignore[operator]
            module.bias.copy_(torch.tensor(bias))  # type: ignore[operator]
    state = modules.state_dict()
    for key in drop:
        del state[key]
    told = {"base_model_name_or_path": "EleutherAI/tiny", "d_model": hidden, "bias": True}
    told |= {"num_hidden_layers": len(lens.bias), "lens_type": "linear_tuned_lens"}
    told |= {"base_model_revision": None, "unembed_hash": "0", **changes}
    folder.mkdir()
    torch.save(state, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_a_folder_of_the_package_is_read(tmp_path):
    lens = some_lens()
    folder = package_folder(tmp_path / "whole", lens)
    back = tuned_lens.load(folder, CONFIG)
    np.testing.assert_array_equal(back.kernel, lens.kernel)
    np.testing.assert_array_equal(back.bias, lens.bias)
    assert tuned_lens.about(folder) == {"source": "EleutherAI/tiny"}
    with pytest.raises(ValueError, match=r"it differs at 1\.bias \(1 in all\)"):
        tuned_lens.load(package_folder(tmp_path / "cut", lens, drop=["1.bias"]), CONFIG)
    with pytest.raises(ValueError, match="no linear tuned lens"):
        tuned_lens.load(package_folder(tmp_path / "mlp", lens, lens_type="mlp"), CONFIG)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        tuned_lens.load(tmp_path, CONFIG)


# Of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained until its layers do something, and its config as a file."""
    folder = tmp_path_factory.mktemp("lenses")
    config = run_config(
        folder, training={"steps": 60, "batch_size": 8}, checkpoint={"every": 60, "extra_steps": []}
    )
    train(config, show_progress=False)
    path = folder / "config.yaml"
    path.write_text(json.dumps(configs.to_dict(config)))
    return config, path


def test_a_fitted_lens_is_nearer_the_model_at_each_layer_on_rows_it_has_not_seen(run, tmp_path):
    config, _ = run
    out = tmp_path / "lens.safetensors"
    found = fit_of(config.checkpoint.directory, config, 0, 60, out, show_progress=False)
    before, after = np.asarray(found.before.kl), np.asarray(found.after.kl)
    assert (after[:-1] < 0.8 * before[:-1]).all() and before[:-1].min() > 1e-3
    np.testing.assert_allclose([before[-1], after[-1]], 0, atol=1e-6)
    model = pj.load(config.checkpoint.directory)
    held = batches(config)[59]
    lens = tuned_lens.load(out, model.config)
    again = lens_losses(model.params, held, model.config, lens=lens)
    np.testing.assert_allclose(found.after.kl, again.kl.mean(axis=1), rtol=1e-4, atol=1e-6)


def test_the_command_fits_and_says_how_well(run, tmp_path):
    config, path = run
    out = tmp_path / "lens.safetensors"
    options = ["fit", config.checkpoint.directory, "--data", str(path), "--rows", "3"]
    arguments = [*options, "--steps", "4:7", "--out", str(out)]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "on step 6, which was held out" in done.output
    assert tuned_lens.about(out)["steps"] == "4:6"
    refused = CliRunner().invoke(command, arguments)
    assert isinstance(refused.exception, FileExistsError)
    other = tmp_path / "other.safetensors"
    for steps, said in (("4:5", "at least two are wanted"), ("0:61", "of the 60 of train_0")):
        refused = CliRunner().invoke(command, [*options, "--steps", steps, "--out", str(other)])
        assert isinstance(refused.exception, ValueError) and said in str(refused.exception)
    assert not other.exists()


# Of a prompt

PROMPT = "ab \nc"


@pytest.fixture(scope="module")
def model():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = replace(CONFIG, vocab_size=256)
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return Model(random_params(config), config, files, source="a random model")


OF = "tuned lens (source a/run step 5, data a run)"


def test_a_prompt_is_read_at_every_layer_and_position(model, tmp_path):
    path = tmp_path / "lens.safetensors"
    tuned_lens.save(some_lens(), path, {"source": "a/run step 5", "step": "5", "data": "a run"})
    found = lens_reading.read_prompt(model, PROMPT, tuned=path, top=3)
    ids = np.array([model.tokenizer.encode(PROMPT).ids], np.int32)
    assert "".join(found.tokens) == PROMPT and found.lens == OF
    expected, _ = tuned_lens.apply(some_lens(), model.params, ids, model.config, top=3)
    np.testing.assert_array_equal(found.ids, expected[:, 0])
    lines = found.text(1).splitlines()
    assert len(lines) == 4 and 'after token 1, "b"; 0 reads the embeddings, 2 is' in lines[-1]
    first = found.words[int(found.ids[2, 1, 0])]
    chance = math.exp(found.log_probabilities[2, 1, 0])
    assert lines[2].startswith(f"  2  {json.dumps(first, ensure_ascii=False)} {chance:.3f}")
    with pytest.raises(ValueError, match="position 5: the prompt has 5 tokens"):
        found.text(5)
    with pytest.raises(ValueError, match="the prompt is empty"):
        lens_reading.read_prompt(model, "")
    with pytest.raises(ValueError, match="a random model: has no tokenizer"):
        lens_reading.read_prompt(replace(model, tokenizer_files={}), PROMPT)


def test_the_command_shows_and_writes_every_position(model, tmp_path):
    folder, table, picture = (tmp_path / name for name in ("hf", "lens.csv", "lens.png"))
    pj.save_hf(model, folder)
    for out in (table, picture):
        done = CliRunner().invoke(
            command,
            ["show", str(folder), PROMPT, "--top", "2", "--out", str(out)],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
    found = lens_reading.read_prompt(model, PROMPT, top=2)
    assert found.text() in done.output and str(picture) in done.output
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 * 2
    assert [int(row["id"]) for row in rows] == found.ids.reshape(-1).tolist()
    written = [float(row["log_probability"]) for row in rows]
    np.testing.assert_allclose(written, found.log_probabilities.reshape(-1), rtol=0, atol=1e-5)
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = {text.get_text() for text in found.figure().axes[0].texts}
    assert len(found.figure().axes[0].texts) == 15 and shown
    refused = CliRunner().invoke(command, ["show", "nowhere", PROMPT, "--out", "a.pdf"])
    assert "name a .csv, a .png or an .svg" in str(refused.exception)
