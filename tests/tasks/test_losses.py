import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from layerwise.errors import DataError, ModelError
from layerwise.tasks import call, loss_of
from models import MODELS, inputs_for


def by_hand(logits, labels):
    """Mean of -log p over the labels that are not -100, one at a time."""
    pairs = [(row, int(label)) for row, label in zip(logits.flatten(0, -2), labels.flatten()) if label != -100]
    return sum(float(row.double().logsumexp(0) - row.double()[label]) for row, label in pairs) / len(pairs)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "gemma3"])
def test_causal_models_predict_the_next_token_of_their_input(name):
    model = MODELS[name]()
    batch = inputs_for(name, model)
    logits = call(model, batch).logits
    assert float(loss_of(model, batch)) == pytest.approx(by_hand(logits[:, :-1], batch["input_ids"][:, 1:]), rel=1e-5)


def test_padding_is_not_predicted():
    model = MODELS["llama"]()
    ids = inputs_for("llama", model, batch=1)["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    batch = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    assert torch.allclose(loss_of(model, batch), loss_of(model, {"input_ids": ids}), atol=1e-6)
    # without a mask nothing is padding: a text may well hold the id
    assert not torch.allclose(loss_of(model, {"input_ids": padded}), loss_of(model, {"input_ids": ids}), atol=1e-3)


def test_padding_on_the_left_predicts_nothing():
    """The first real token comes after padding: what is said there is no prediction of it."""
    model = MODELS["llama"]()
    model.model.embed_tokens.weight[0] = 1.0  # as a token that was trained
    ids = inputs_for("llama", model, batch=1)["input_ids"]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    batch = {"input_ids": padded, "attention_mask": (padded != 0).long()}
    assert torch.allclose(loss_of(model, batch), loss_of(model, {"input_ids": ids}), atol=1e-5)


def test_labels_that_are_given_are_used():
    model = MODELS["llama"]()
    batch = inputs_for("llama", model)
    labels = batch["input_ids"].masked_fill(torch.arange(12) < 8, -100)
    logits = call(model, batch).logits
    got = float(loss_of(model, batch | {"labels": labels}))
    assert got == pytest.approx(by_hand(logits[:, :-1], labels[:, 1:]), rel=1e-5)
    assert got == pytest.approx(float(model(**batch, labels=labels).loss), rel=1e-5)


def test_the_decoder_of_t5_writes_its_labels():
    model = MODELS["t5"]()
    labels = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    labels[1, 5:] = -100
    ids = inputs_for("t5", model)["input_ids"]
    expected = model(input_ids=ids, labels=labels).loss
    assert torch.allclose(loss_of(model, {"input_ids": ids, "labels": labels}), expected, atol=1e-5)
    fed = model._shift_right(labels)  # what the decoder is fed says what it should write, but for the last token
    got = loss_of(model, {"input_ids": ids, "decoder_input_ids": fed})
    logits = model(input_ids=ids, decoder_input_ids=fed).logits
    assert float(got) == pytest.approx(by_hand(logits[:, :-1], fed[:, 1:]), rel=1e-5)
    mask = torch.ones_like(fed)
    mask[:, 4:] = 0
    got = loss_of(model, {"input_ids": ids, "decoder_input_ids": fed, "decoder_attention_mask": mask})
    assert float(got) == pytest.approx(by_hand(logits[:, :3], fed[:, 1:4]), rel=1e-5)


@pytest.mark.parametrize("name", ["vit", "timm_vit", "cifar_resnet", "convnext"])
def test_classifiers(name):
    model = MODELS[name]()
    batch = inputs_for(name, model)
    logits = call(model, batch)
    logits = logits if torch.is_tensor(logits) else logits.logits
    labels = torch.tensor([1, 0])
    assert float(loss_of(model, batch | {"labels": labels})) == pytest.approx(by_hand(logits, labels), rel=1e-5)


def test_images_and_texts_of_a_pair_belong_together():
    model = MODELS["clip"]()
    batch = inputs_for("clip", model, batch=3)
    assert torch.allclose(loss_of(model, batch), model(**batch, return_loss=True).loss, atol=1e-6)
    per_image = model(**batch).logits_per_image
    own = torch.arange(3)
    assert float(loss_of(model, batch)) == pytest.approx(
        (by_hand(per_image, own) + by_hand(per_image.T, own)) / 2, rel=1e-5
    )


@pytest.mark.parametrize("name", ["llava", "blip2"])
def test_image_tokens_are_not_predicted(name):
    model = MODELS[name]()
    batch = inputs_for(name, model)
    ids = batch["input_ids"]
    first = int((ids[0] == 3).sum())  # image tokens come first, their id is 3
    logits = call(model, batch).logits
    assert float(loss_of(model, batch)) == pytest.approx(by_hand(logits[:, first - 1 : -1], ids[:, first:]), rel=1e-5)


def test_blip2_with_an_encoder_decoder():
    import transformers as t

    from models import _T5, ENCODER, TEXT, VISION

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.Blip2ForConditionalGeneration(
            t.Blip2Config(
                vision_config=VISION,
                qformer_config={**TEXT, **ENCODER, "encoder_hidden_size": 32, "cross_attention_frequency": 2},
                text_config=t.T5Config(**_T5).to_dict(),
                num_query_tokens=4,
                image_token_index=3,
            )
        ).eval()
    batch = inputs_for("blip2", model)
    with pytest.raises(DataError, match=r"Blip2ForConditionalGeneration needs labels .* hold input_ids, pixel_values"):
        loss_of(model, batch)
    labels = torch.randint(4, 90, (2, 5), generator=torch.Generator().manual_seed(1))
    expected = model(**batch, labels=labels).loss
    assert torch.allclose(loss_of(model, batch | {"labels": labels}), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5", "vit", "clip", "llava"])
def test_losses_are_float32_whatever_the_weights(name):
    model = MODELS[name]().bfloat16()
    batch = inputs_for(name, model)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    batch |= {"labels": torch.tensor([1, 0])} if name == "vit" else {}
    loss = loss_of(model, batch)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    # of bfloat16 logits, not rounded to bfloat16 once more: 8 bits could not tell these apart
    if name == "llama":
        logits = call(model, batch).logits.float()[:, :-1]
        expected = cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_may_bring_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x):
            return {"loss": self.scale * x.sum()}

    loss = loss_of(Own(), {"x": torch.ones(3)})
    assert loss.dtype == torch.float32
    assert float(loss) == 6
    bert, batch = MODELS["bert"](), inputs_for("bert", None)
    labels = batch["input_ids"].masked_fill(torch.arange(12) % 3 > 0, -100)
    got = loss_of(bert, batch | {"labels": labels})
    assert float(got) == pytest.approx(by_hand(bert(**batch).logits, labels), rel=1e-5)  # not the next token


@pytest.mark.parametrize(("name", "missing"), [("vit", "labels"), ("timm_vit", "labels"), ("bert", "labels")])
def test_batches_without_labels_are_refused(name, missing):
    model = MODELS[name]()
    batch = inputs_for(name, model)
    with pytest.raises(DataError, match=f"needs {missing} .* hold {', '.join(batch)}") as caught:
        loss_of(model, batch)
    assert "\n" not in str(caught.value)


def test_t5_without_labels_is_refused():
    model = MODELS["t5"]()
    with pytest.raises(DataError, match=r"T5ForConditionalGeneration needs labels \(which token ids"):
        loss_of(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_a_model_without_a_loss_is_refused(name):
    model = MODELS[name]()
    with pytest.raises(ModelError, match=rf"{type(model).__name__} has no loss that is known: it gives sample"):
        loss_of(model, inputs_for(name, model))


def test_nothing_to_predict_and_labels_of_another_shape_are_refused():
    model = MODELS["llama"]()
    ids = torch.full((1, 4), 5)
    with pytest.raises(DataError, match="nothing to predict"):
        loss_of(model, {"input_ids": ids, "attention_mask": torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises(DataError, match="one label per prediction"):
        loss_of(model, {"input_ids": ids, "labels": ids[:, :2]})


def test_labels_beyond_the_classes_are_refused():
    model = MODELS["vit"]()  # of two classes
    batch = inputs_for("vit", model)
    with pytest.raises(DataError, match="labels run from 1 to 7; the model knows 2 classes"):
        loss_of(model, batch | {"labels": torch.tensor([1, 7])})
    with pytest.raises(DataError, match="labels run from -1 to 1"):
        loss_of(model, batch | {"labels": torch.tensor([1, -1])})


def test_a_plain_module_over_tokens_is_a_causal_language_model():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    with torch.random.fork_rng(devices=[]):
        model = Plain()
    ids = torch.tensor([[1, 5, 3], [2, 2, 8]])
    assert float(loss_of(model, {"input_ids": ids})) == pytest.approx(by_hand(model(ids)[:, :-1], ids[:, 1:]), rel=1e-5)


def test_a_forward_that_insists_on_labels_gets_them():
    class Insists(nn.Module):
        def forward(self, x, labels):
            return {"loss": (x - labels).square().mean()}

    assert float(loss_of(Insists(), {"x": torch.tensor([1.0, 2.0]), "labels": torch.tensor([1, 0])})) == 2


def test_one_pair_alone_is_no_contrast():
    model = MODELS["clip"]()
    with pytest.raises(DataError, match="at least 2 in a batch"):
        loss_of(model, inputs_for("clip", model, batch=1))


def test_equal_similarities_are_worth_log_of_the_batch():
    class Blind(nn.Module):
        def forward(self, x):
            return {"logits_per_image": x}

    assert float(loss_of(Blind(), {"x": torch.zeros(4, 4)})) == pytest.approx(math.log(4))
