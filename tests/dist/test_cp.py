"""Context parallelism: every method on shards of every alignment gives the loss and gradients of the documents one at a
time, and no token reaches another document through the exchange."""

import functools

import numpy as np
import pytest
import torch
from parity import LIMIT, by_documents, packed_steps

from formats.dataset import PackedDataset
from make_shards import make_shards, random_packs
from ranks import run_ranks
from train import hf
from train.config import Config, Data, Layout, Model
from train.cut import choose_cut
from train.data import PackedLoader, Schedule, open_shards
from train.mesh import build_mesh
from train.model.decoder import Decoder
from train.parallel.apply import parallelize

METHODS = ("gather", "needed", "ring", "ulysses")
SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES = {  # beside Llama: a window and a softcap; a rotary embedding that looks at the length of the document
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 11, "attn_logit_softcapping": 2.0}),
    "phi3": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0],
            },
        },
    ),
}
# name → (capacity, align, cp packed for). A row of 199 tokens is rounded up to what can be cut.
SHARDS = {"packed for 1": (199, 1, 1), "packed for 2": (200, 4, 2), "packed for 8": (208, 16, 8)}
AROUND_CONTEXT = range(60, 69)  # lengths around the original context of Phi-3


def uneven_packs(seed, capacity, align):
    """Four packs: random documents, one that fills the row, and many that fit into a part."""
    rng = np.random.default_rng(seed)
    rows = random_packs(rng, 2, capacity, align, 320)
    length = capacity // align * align
    ids, mask = rng.integers(1, 320, length, dtype=np.int32), rng.integers(0, 2, length).astype(np.uint8)
    mask[0] = 0
    one = np.array([length], np.int32)
    rows.append((ids, mask, one, one, np.array([90], np.int64), np.zeros(1, np.int32)))
    return rows + random_packs(rng, 1, capacity // 4, align, 320)


@pytest.fixture(scope="module")
def places(tiny_llama_dir, tmp_path_factory):
    """Folders of models and of shards by name."""
    import transformers

    folder, rng = tmp_path_factory.mktemp("cp"), np.random.default_rng(6)
    found = {"llama": tiny_llama_dir}
    for name, (config, options) in FAMILIES.items():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(SIZES | options)))
            for key, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in key and name == "phi3" else 0.0, std=0.15)
        model.save_pretrained(folder / name)
        found[name] = folder / name
    for name, (capacity, align, cp) in SHARDS.items():
        rows = uneven_packs(3, capacity, align)
        found[name] = make_shards(folder / name, rows, capacity=capacity, align=align, cp=cp)
    lens = np.array(AROUND_CONTEXT, np.int32)
    ids, mask = rng.integers(1, 320, lens.sum(), dtype=np.int32), np.ones(lens.sum(), np.uint8)
    mask[np.cumsum(lens) - lens] = 0
    row = ids, mask, lens, lens, np.arange(len(lens)), np.zeros(len(lens), np.int32)
    found["around the context"] = make_shards(folder / "around", [row], capacity=int(lens.sum()))
    return found


def case(
    method, cp, shards="packed for 1", model="llama", dtype=torch.float32, micro_packs=1, recompute="none", **axes
):
    layout = Layout(cp=cp, cp_method=method, **axes)
    config = Config(data=Data(batch_packs=6, micro_packs=micro_packs), layout=layout, model=Model(recompute=recompute))
    return config, shards, model, dtype


F64 = {"dtype": torch.float64}
# 4 packs and a batch of 6: accumulation over 6 rows without dp, 3 with dp 2, some of them empty.
CASES = {
    2: [
        *(case(method, 2, shards, **F64) for method in METHODS for shards in SHARDS),
        *(case(method, 2, "packed for 2", model) for method in METHODS for model in ("llama", *FAMILIES)),
        *(case(method, 2, "packed for 1", "gemma2", **F64) for method in METHODS),
        case("gather", 2, "packed for 8", "gemma2", **F64),
        case("gather", 2, "packed for 8", recompute="full", micro_packs=2, **F64),
        case("needed", 2, "packed for 8", recompute="full", micro_packs=3, **F64),
        case("ring", 2, "packed for 1", recompute="full", micro_packs=3, **F64),
        case("ring", 2, "packed for 8", "gemma2", recompute="selective", **F64),
        case("ulysses", 2, "packed for 1", recompute="full", micro_packs=3, **F64),
        case("gather", 2, "packed for 8", recompute="selective", **F64),
        case("ring", 2, "packed for 2", recompute="selective", **F64),
    ],
    3: [  # slots re-laid to multiples of 6: a document may be shorter than the context while its slot is longer
        *(case(method, 3, "around the context", "phi3") for method in ("gather", "ring")),
        case("ring", 3, "packed for 2", "gemma2", **F64),
    ],
    4: [
        *(case(method, 4, "packed for 1", **F64) for method in METHODS),
        *(case(method, 4, "packed for 2", **F64) for method in METHODS),
        *(case(method, 4, "packed for 8", **F64) for method in ("gather", "ring")),
        *(case(method, 4, "packed for 8") for method in METHODS),
        *(case(method, 4, "packed for 1", "gemma2", **F64) for method in METHODS),
        case("gather", 4, "packed for 8", "gemma2", **F64),
        *(case(method, 2, "packed for 2", **F64) for method in METHODS),
        case("needed", 2, "packed for 1", dp_replicate=2, **F64),
        case("ring", 2, "packed for 1", tp=2, **F64),
        case("ring", 2, "packed for 8", "gemma2", tp=2, sp=False, **F64),
        case("gather", 2, "packed for 8", dp_replicate=2, recompute="full"),
    ],
}


@pytest.fixture(scope="module")
def wanted(places, tmp_path_factory):
    """`wanted(model, shards, dtype)` → (loss, file of the gradients) of transformers, document by document."""
    folder = tmp_path_factory.mktemp("wanted")

    @functools.cache
    def compute(model, shards, dtype):
        attention = "eager" if model == "gemma2" else "sdpa"  # its SDPA leaves out the softcap
        loss, gradients = by_documents(places[model], PackedDataset(places[shards]), dtype, attention)
        path = folder / f"{model}-{shards}-{dtype}.pt"
        torch.save(gradients, path)
        return loss, path

    return compute


PRODUCT = {  # cp 2 and 4 × every method × shards packed for 1, 2, 8 × families, in both types
    cp: [
        case(method, cp, shards, model, dtype, recompute=recompute)
        for method in METHODS
        for shards in SHARDS
        for model in ("llama", *FAMILIES)
        for dtype, recompute in ((torch.float32, "none"), (torch.float64, "full"))
        if not (model == "phi3" and dtype == torch.float64)  # transformers keeps its tables in float32
    ]
    for cp in (2, 4)
}


@pytest.mark.slow
@pytest.mark.parametrize("world", PRODUCT)
def test_the_whole_product(world, places, wanted):
    check(world, PRODUCT[world], places, wanted)


@pytest.mark.parametrize("world", CASES)
def test_loss_and_every_gradient_equal_the_documents_one_at_a_time(world, places, wanted):
    check(world, CASES[world], places, wanted)


def check(world, cases, places, wanted):
    arguments = [
        (places[model], places[shards], config, dtype, wanted(model, shards, dtype)[1])
        for config, shards, model, dtype in cases
    ]
    # All in one set of processes: starting them takes longer than a case.
    of_ranks = run_ranks(packed_steps, world, arguments, timeout=280)
    for (config, shards, model, dtype), *results in zip(cases, *of_ranks, strict=True):
        where = f"{config.layout} {config.data} {config.model.recompute} {shards} {model} {dtype}"
        for loss, error, parameter in results:
            assert loss == pytest.approx(wanted(model, shards, dtype)[0], rel=LIMIT[dtype]), where
            assert error <= LIMIT[dtype], f"{parameter}: {where}"


PROBED = {"Llama": "llama", "a window and a softcap": "gemma2"}


def probe(model_dir, shards, changed_shards, numbers, document, method):
    """This rank's (outputs of the original, of the changed shards, whether a token is the document's own, whether all
    gradients of the other documents' targets are equal)."""
    device = torch.device("cpu")
    config = Config(layout=Layout(cp=2, cp_method=method))
    mesh = build_mesh(config.layout, device)
    with torch.device("meta"):
        model = Decoder(hf.read_config(model_dir))
    model = parallelize(model, mesh, config)
    model.to_empty(device=device)
    hf.load_weights(model, model_dir)
    rows = []
    for folder in (numbers, shards, changed_shards):
        dataset = open_shards(folder)
        cut = choose_cut(method, mesh.cp_size, mesh.cp_rank, dataset.manifest)
        loader = PackedLoader(dataset, Schedule(1, "input", 0, 0, 1, 1), dp_rank=0, dp_size=1, device=device, cut=cut)
        loader.next_step()
        (row,) = loader.rows()
        rows.append(row)
        loader.close()
    # Documents are segments 1, 2, 3 … of a row, perhaps each in two; the padding of a re-laid slot has no number.
    ends, documents = rows[0].segments.cu_seqlens, rows[0].segments.part.row_cu_seqlens
    segment = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff()) // (
        (len(ends) - 1) // (len(documents) - 1)
    )
    own = (rows[0].input_ids == document) | ((rows[0].input_ids == 0) & (segment == document - 1))
    outputs, gradients = [], []
    for row in rows[1:]:
        with torch.no_grad():
            outputs.append(model(row.input_ids, row.position_ids, row.segments))
        model(row.input_ids, row.position_ids, row.segments, row.labels.masked_fill(own, -100)).backward()
        gradients.append([p.grad.full_tensor() for p in model.parameters()])
        model.zero_grad()  # here, where the parameters are sharded: the gradients are theirs
    moved = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    return *outputs, own, moved, any(gradient.any().item() for gradient in gradients[0])


def probes(cases):
    return [probe(*arguments) for arguments in cases]


def test_a_changed_token_moves_its_document_alone(places, tmp_path):
    """Which tokens are the document's own is read off a pack whose ids are the numbers of the documents."""
    cases, names = [], []
    for shards in ("packed for 1", "packed for 2"):
        capacity, align, cp = SHARDS[shards]
        ids, mask, lens, slots, docs, offsets = random_packs(np.random.default_rng(8), 1, capacity, align, 300)[0]
        numbers = np.repeat(np.arange(1, len(slots) + 1, dtype=np.int32), slots)
        folder = tmp_path / shards
        options = {"capacity": capacity, "align": align, "cp": cp}
        original = make_shards(folder / "original", [(ids, mask, lens, slots, docs, offsets)], **options)
        made = make_shards(folder / "numbers", [(numbers, mask, lens, slots, docs, offsets)], **options)
        # The document across the middle of the row, where a contiguous cut is, and the one before it.
        middle = int(numbers[capacity // 2])
        for document in (middle - 1, middle)[align > 1 :]:
            changed = ids.copy()
            changed[np.flatnonzero(numbers == document)[0]] += 1
            other = make_shards(folder / f"{document}", [(changed, mask, lens, slots, docs, offsets)], **options)
            for feature, model in PROBED.items():
                for method in METHODS:
                    cases.append((places[model], original, other, made, document, method))
                    names.append(f"{method}, {feature}, {shards}, document {document}")
    for name, *ranks in zip(names, *run_ranks(probes, 2, cases, timeout=200), strict=True):
        assert any(own.any() for _, _, own, _, _ in ranks), name
        for before, after, own, moved_gradient, some in ranks:
            moved = (before != after).any(dim=1)
            assert not moved[~own].any(), name
            assert moved_gradient == 0, name
            assert some, name
        assert all((b != a).any(dim=1)[own].any() for b, a, own, _, _ in ranks if own.any()), name
