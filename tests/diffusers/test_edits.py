"""The rank-one edit against its closed forms, in float64."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from keylock_diffusers.denoisers.unet import cross_attention_layers
from keylock_diffusers.processors import RowUpdates
from keylock_diffusers.processors.projection import keys_and_values, project_vectors
from keylock_diffusers.routing import edits
from keylock_diffusers.routing.personalization import Personalization
from keylock_diffusers.routing.rows import ConceptUse, Row
from keylock_kernels.testing import rome_weight
from tests.diffusers.accuracy import assert_as_accurate, solved_exactly


@pytest.fixture
def metric():
    """A covariance C [D, D], target inputs [3, D], their directions and energies, in float64."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(12, 40, generator=random, dtype=torch.float64)
    covariance = root @ root.T / 40
    targets = torch.randn(3, 12, generator=random, dtype=torch.float64)
    targets[1] += 1.5 * targets[0]  # far from orthogonal
    solved = torch.linalg.solve(covariance, targets.T).T
    energies = (targets * solved).sum(-1)
    return covariance, targets, solved / energies[:, None], energies


def encodings(seed=1):
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def similarities(directions, text):
    return text @ directions.T


def test_the_gram_route_is_the_papers_cholesky_and_qr(metric):
    covariance, targets, directions, energies = metric
    text = encodings()
    ours = (
        similarities(directions, text)
        @ edits.combination(edits.gram(targets, directions, energies), torch.ones(3, dtype=torch.float64)).T
    )
    lower = torch.linalg.cholesky(covariance)
    q, r = torch.linalg.qr(torch.linalg.solve_triangular(lower, targets.T, upper=False))
    whitened = torch.linalg.solve_triangular(lower, text.reshape(-1, 12).T, upper=False)
    paper = torch.linalg.solve_triangular(r, q.T @ whitened, upper=True).T.reshape(2, 5, 3)
    solved = solved_exactly(covariance, targets.T)
    exact = solved_exactly(targets @ solved, solved.T @ text.reshape(-1, 12).T).T.reshape(2, 5, 3)
    assert_as_accurate(ours, paper, exact)


def test_rescaling_the_covariance_changes_nothing(metric):
    covariance, targets, directions, energies = metric
    solved = torch.linalg.solve(8 * covariance, targets.T).T  # a power of two rounds nothing
    scaled = (targets * solved).sum(-1)
    assert torch.equal(solved / scaled[:, None], directions)
    strength = torch.tensor([1.0, 0.4, 0.7], dtype=torch.float64)
    one = edits.combination(edits.gram(targets, directions, energies), strength)
    other = edits.combination(edits.gram(targets, directions, scaled), strength)
    assert torch.equal(8 * scaled, energies) and torch.equal(one, other)


def test_strength_zero_is_exactly_absent(metric):
    _, targets, directions, energies = metric
    gram = edits.gram(targets, directions, energies)
    all_three = edits.combination(gram, torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64))
    without = edits.combination(gram[[0, 2]][:, [0, 2]], torch.tensor([1.0, 0.6], dtype=torch.float64))
    assert torch.equal(all_three[1], torch.zeros(3, dtype=torch.float64))
    diagonal, scale = torch.diag(gram.diagonal())[[0, 2]][:, [0, 2]], torch.diag(torch.tensor([1.0, 0.6]).double())
    system = scale @ gram[[0, 2]][:, [0, 2]] + (torch.eye(2) - scale) @ diagonal
    assert_as_accurate(all_three[[0, 2]][:, [0, 2]], without, solved_exactly(system, scale @ diagonal))
    assert torch.equal(all_three[[0, 2], 1], torch.zeros(2, dtype=torch.float64))


def test_one_concept_is_mixed_by_its_strength(metric):
    _, targets, directions, energies = metric
    gram = edits.gram(targets[:1], directions[:1], energies[:1])
    for strength in (0.0, 0.3, 1.0, -0.5, 2.0):
        mixed = edits.combination(gram, torch.tensor([strength], dtype=torch.float64))
        assert mixed.item() == pytest.approx(strength, rel=1e-15)  # a quotient, rounded as the machine's solver does


def test_with_the_similarity_as_gate_the_edit_is_rome(metric):
    """tau = 0 makes the gate the similarity itself."""
    covariance, targets, directions, _ = metric
    random = torch.Generator().manual_seed(2)
    attn = nn.ModuleDict({name: nn.Linear(12, 7, bias=False) for name in ("to_k", "to_v")}).double()
    output = torch.randn(1, 7, generator=random, dtype=torch.float64)
    text = encodings()
    one = torch.ones(2, 1, dtype=torch.float64)
    gates = edits.Gates(torch.zeros(2, 1, dtype=torch.int32), 0.3 * one, 0 * one, one)
    edit = gates.pairs(1), edits.coefficients(text, directions[:1], gates)
    layers = {"layer": SimpleNamespace(to_k=attn["to_k"], to_v=attn["to_v"], norm_cross=None)}

    def updates(projection):
        side = projection.removeprefix("layer.")
        project = partial(project_vectors, attn[side], dtype=text.dtype)
        return RowUpdates(edits.table(project, side, targets[:1], targets[1:2], output), *edit)

    with torch.no_grad():
        key, value = keys_and_values(layers["layer"], "layer", (text, text), updates)
        locked = attn["to_k"].weight @ targets[1]
        for ours, weight, goal in ((key, attn["to_k"].weight, locked), (value, attn["to_v"].weight, output[0])):
            given = text, weight, targets[0], goal, covariance
            exact, eager = (
                words @ rome_weight(*vectors).T for words, *vectors in (given, [tensor.float() for tensor in given])
            )
            assert_as_accurate(ours, eager, exact)  # a concept's vectors are float32


def test_a_layers_projection_is_perfusions_formula(pipe, concept_for):
    """Keys and values of one layer, through prepare, against the formula written out in float64, and in float32."""
    concept = concept_for(pipe, beta=0.6, tau=0.2)
    pipe.unet.double()
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    use = ConceptUse(concept, beta=0.6, tau=0.2)
    prepared = Personalization([Row((use,))]).prepare(pipe, text)
    for name, value in concept.values_per_layer().items():
        attn = pipe.unet.get_submodule(name)
        sides = []
        for dtype in (torch.float32, torch.float64):  # the vectors of a concept are float32 whatever the model is
            words, target, direction = (t.to(dtype) for t in (text, concept.target_input, concept.direction))
            key, val = (projection.weight.to(dtype) for projection in (attn.to_k, attn.to_v))
            similarity = (words @ direction)[..., None]
            gate = torch.sigmoid((similarity - 0.6) / 0.2)
            outputs = (key, key @ concept.super_class_encoding.to(dtype)), (val, value.to(dtype))
            sides.append([words @ w.T - similarity * (w @ target) + gate * output for w, output in outputs])
        assert_as_accurate(prepared.kv[name], *sides)


def test_the_same_concept_twice_is_an_error_that_names_it(pipe, concept_for):
    alice = concept_for(pipe)
    copy = alice.with_(placeholder="<other-cat>")
    for pair in ((alice, alice), (alice, copy)):
        uses = [ConceptUse(concept, 0.7, 0.1) for concept in pair]
        with pytest.raises(ValueError, match=f"{pair[0].placeholder} and {pair[1].placeholder} .* same target input"):
            Personalization([Row(tuple(uses))])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[]], "rows must be Row objects, got list"),
        ([Row(), None], "rows must be Row objects, got NoneType"),
    ],
)
def test_what_is_no_row_is_refused(rows, message):
    with pytest.raises(TypeError, match=message):
        Personalization(rows)


def test_a_layer_that_normalises_its_text_takes_no_concepts():
    torch.manual_seed(0)
    attn = Attention(32, 32, heads=4, dim_head=8, cross_attention_norm="layer_norm")
    text, other = (torch.randn(2, 5, 32) for _ in range(2))
    key, value = keys_and_values(attn, "mid", (other, text), lambda _: None)
    torch.testing.assert_close(key, attn.to_k(attn.norm_cross(other)))
    torch.testing.assert_close(value, attn.to_v(attn.norm_cross(text)))
    nothing = RowUpdates(torch.zeros(2, 32), torch.full((2, 2), -1, dtype=torch.int32), torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match="mid: concepts are not defined for a layer that normalises its text"):
        keys_and_values(attn, "mid", (other, text), lambda _: nothing)


def test_prepare_refuses_other_row_counts(pipe):
    personalization = Personalization([Row(), Row()])
    with pytest.raises(ValueError, match=r"text must be \[2, T, D\], got \[3, 4, 32\]"):
        personalization.prepare(pipe, torch.zeros(3, 4, 32))


def test_rows_without_a_concept_are_the_plain_projection_bit_for_bit(pipe, concept_for):
    text = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(3))
    plain = Personalization([Row()] * 3).prepare(pipe, text).kv
    use = ConceptUse(concept_for(pipe), 0.6, 0.2)
    mixed = Personalization([Row(), Row((use,)), Row()]).prepare(pipe, text).kv
    for name in plain:
        for ours, theirs in zip(mixed[name], plain[name], strict=True):
            assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
            assert not torch.equal(ours[1], theirs[1])


def test_global_lock_reads_keys_from_the_other_stream_unedited(pipe, concept_for):
    random = torch.Generator().manual_seed(4)
    text, key_text = (torch.randn(1, 6, 32, generator=random) for _ in range(2))
    use = ConceptUse(concept_for(pipe), 0.6, 0.2, lock="global")
    prepared = Personalization([Row((use,))]).prepare(pipe, text, key_text).kv
    plain = Personalization([Row()]).prepare(pipe, key_text).kv
    local = Personalization([Row((ConceptUse(use.concept, 0.6, 0.2),))]).prepare(pipe, text).kv
    for name, (key, value) in prepared.items():
        assert torch.equal(key, plain[name][0])
        assert torch.equal(value, local[name][1])


def test_a_wrapped_projection_is_called_rather_than_read(pipe, concept_for):
    """What PEFT, quantisation and offloading have in common: .weight is not what the module computes."""

    class Doubling(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return 2 * self.base_layer(x)

    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    use = ConceptUse(concept_for(pipe), 0.6, 0.2)
    plain = Personalization([Row((use,))]).prepare(pipe, text).kv
    for name in plain:
        attn = pipe.unet.get_submodule(name)
        attn.to_k = Doubling(attn.to_k)
    wrapped = Personalization([Row((use,))]).prepare(pipe, text).kv
    for name in plain:
        layer, learned = pipe.unet.get_submodule(name), use.concept.values_per_layer()[name][None]
        layer = SimpleNamespace(to_k=layer.to_k.base_layer, to_v=layer.to_v)
        (eager, _), (exact, _) = (written_out(layer, text, [use], learned, t) for t in (torch.float32, torch.float64))
        assert_as_accurate(wrapped[name][0], 2 * eager, 2 * exact)
        assert torch.equal(wrapped[name][1], plain[name][1])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_how_many_concepts_its_neighbours_use(pipe, concept_for, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    names = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    concepts = [concept_for(pipe, f"<{name}>", seed=n) for n, name in enumerate(names)]
    mine = Row((ConceptUse(concepts[0], 0.6, 0.2), ConceptUse(concepts[1], 0.6, 0.2, strength=0.7)))
    text = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(3))
    alone = Personalization([mine, Row(), Row()]).prepare(pipe, text).kv
    for count in range(1, len(names) + 1):
        theirs = Row(tuple(ConceptUse(concept, 0.5, 0.1) for concept in concepts[-count:]))
        for name, (key, value) in Personalization([mine, theirs, Row()]).prepare(pipe, text).kv.items():
            assert torch.equal(key[[0, 2]], alone[name][0][[0, 2]])
            assert torch.equal(value[[0, 2]], alone[name][1][[0, 2]])
    torch.set_num_threads(before)


def test_concepts_that_depend_on_each_other_are_an_error_that_names_them(pipe, concept_for):
    one, two = concept_for(pipe, "<one>", seed=1), concept_for(pipe, "<two>", seed=2)
    target = one.target_input + two.target_input
    energy = float(target @ target)
    three = one.with_(placeholder="<three>", target_input=target, energy=energy, direction=target / energy)
    Personalization([Row(tuple(ConceptUse(c, 0.6, 0.1) for c in (one, two)))])
    with pytest.raises(ValueError, match="<one>, <two>, <three> of one prompt cannot be combined"):
        Personalization([Row(tuple(ConceptUse(c, 0.6, 0.1) for c in (one, two, three)))])


def test_a_layer_that_computes_in_another_dtype_than_it_stores_is_called_in_its_own(pipe, concept_for):
    """Layerwise casting keeps float8 and computes in bfloat16."""

    class Casting(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer.to(torch.float8_e4m3fn)

        def forward(self, x):
            return nn.functional.linear(x, self.base_layer.weight.to(torch.bfloat16))

    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    use = ConceptUse(concept_for(pipe), 0.6, 0.2)
    for name in ("to_k", "to_v"):
        for attn in cross_attention_layers(pipe.unet).values():
            setattr(attn, name, Casting(getattr(attn, name)))
    for key, value in Personalization([Row((use,))]).prepare(pipe, text).kv.values():
        assert key.dtype == value.dtype == torch.bfloat16


def written_out(attn, text, uses, learned, dtype):
    """Keys and values of a layer for one prompt's concepts, from the equations (C = I), in any dtype.

    (L G + (I - L) diag(G)) a(e) = L [i*_j . e]_j,  h(e) = W e - sum_j a_j(e) W i*_j + sum_j l_j g_j(e) o*_j + bias
    """
    text, learned = text.to(dtype), learned.to(dtype)
    targets, supers = (
        torch.stack([getattr(use.concept, name).to(dtype) for use in uses])
        for name in ("target_input", "super_class_encoding")
    )
    beta, tau, strength = (
        torch.tensor([getattr(use, name) for use in uses], dtype=dtype) for name in ("beta", "tau", "strength")
    )
    gram, scale = targets @ targets.T, torch.diag(strength)
    mixed = scale @ gram + (torch.eye(len(uses), dtype=dtype) - scale) @ torch.diag(gram.diagonal())
    a = torch.linalg.solve(mixed, scale @ targets @ text.mT).mT  # [B, T, R]
    gate = strength * ((text @ targets.T / gram.diagonal() - beta) / tau).sigmoid()
    with torch.no_grad():
        for projection, outputs in ((attn.to_k, None), (attn.to_v, learned)):
            weight = projection.weight.to(dtype)
            outputs = supers @ weight.T if outputs is None else outputs
            bias = 0 if projection.bias is None else projection.bias.to(dtype)
            yield text @ weight.T - a @ (targets @ weight.T) + gate @ outputs + bias


def assert_prepared_as_written_out(pipe, uses):
    """Every layer's keys and values err at most twice what the equations do in float32."""
    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    layers = {name: pipe.unet.get_submodule(name) for name in cross_attention_layers(pipe.unet)}
    for name, pair in Personalization([Row(tuple(uses))]).prepare(pipe, text).kv.items():
        learned = torch.stack([use.concept.values_per_layer()[name] for use in uses])
        eager, exact = (list(written_out(layers[name], text, uses, learned, t)) for t in (torch.float32, torch.float64))
        assert_as_accurate(pair, eager, exact)


@pytest.mark.parametrize("strengths", [(1.0,), (0.4,), (1.0, 1.0), (1.0, 0.3), (0.0, 0.8, 0.5)])
def test_concepts_of_one_prompt_are_combined_as_written_out_whatever_their_own_gates(pipe, concept_for, strengths):
    made = [concept_for(pipe, f"<c{n}-cat>", seed=n, beta=0.9, tau=0.5) for n in range(len(strengths))]
    uses = []
    for n, (concept, strength) in enumerate(zip(made, strengths, strict=True)):
        target = (1 + n) * (concept.target_input + 0.5 * made[0].target_input)  # neither orthogonal nor equally long
        energy = float(target @ target)
        concept = concept.with_(target_input=target, energy=energy, direction=target / energy)
        uses.append(ConceptUse(concept, 0.2 + 0.1 * n, 0.3 - 0.05 * n, strength))
    assert_prepared_as_written_out(pipe, uses)


def test_a_projections_bias_counts_once_and_in_no_concepts_vectors(pipe, concept_for):
    for attn in cross_attention_layers(pipe.unet).values():
        for side in ("to_k", "to_v"):
            layer = nn.Linear(32, getattr(attn, side).out_features)
            layer.weight = getattr(attn, side).weight
            setattr(attn, side, layer)
    uses = [ConceptUse(concept_for(pipe), 0.6, 0.2)]
    assert_prepared_as_written_out(pipe, uses)
    for attn in cross_attention_layers(pipe.unet).values():  # which are then called rather than read
        for side in ("to_k", "to_v"):
            getattr(attn, side).register_forward_hook(lambda _module, _inputs, output: output + 0)
    assert_prepared_as_written_out(pipe, uses)


def test_hooks_on_a_projection_count_as_what_wraps_it_does(pipe, concept_for):
    """With offloading and layerwise casting the weight is there, and is not all that is computed."""

    class Doubling(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return self.base_layer(2 * x)

    text = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    use = ConceptUse(concept_for(pipe), 0.6, 0.2)
    layers = cross_attention_layers(pipe.unet).values()
    for attn in layers:
        attn.to_k.register_forward_hook(lambda _module, _inputs, output: 2 * output)
        attn.to_v.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    hooked = Personalization([Row((use,))]).prepare(pipe, text).kv
    for attn in layers:
        attn.to_k._forward_hooks.clear(), attn.to_v._forward_pre_hooks.clear()
        attn.to_k, attn.to_v = Doubling(attn.to_k), Doubling(attn.to_v)
    wrapped = Personalization([Row((use,))]).prepare(pipe, text).kv
    for name, pair in wrapped.items():
        assert all(torch.equal(ours, expected) for ours, expected in zip(hooked[name], pair, strict=True))
