"""Where a model lives, and which stock class loads it: a name becomes a local folder, a folder becomes a loader."""

import difflib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtra, ModelError
from ..shrink import REMOTE_MODULE

# Tried in this order for `architectures[0]` of config.json; the table of each is in transformers' modeling_auto.
_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}
REMOTE_PREFIX = "Layerwise"  # of the classes in a modelling file of ours
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors", "diffusion_pytorch_model*.safetensors"]
_HUB_VARIANTS = ["*.fp16.safetensors", "*.non_ema.safetensors", "*/*"]  # other precisions, other parts of a pipeline


@dataclass(frozen=True)
class Loader:
    """A class of a stock library whose `from_pretrained` builds the model of a folder."""

    library: str  # "transformers" or "diffusers"
    class_name: str
    remote_code: bool = False  # the folder's own Python code is run

    def get(self) -> Any:
        """The class. Raises MissingExtra if its library is not installed."""
        if self.library == "diffusers":
            try:
                import diffusers
            except ModuleNotFoundError as error:
                if error.name != "diffusers":
                    raise
                raise MissingExtra("a diffusers model needs diffusers: pip install 'layerwise[vision]'.") from error
            return getattr(diffusers, self.class_name)
        import transformers

        return getattr(transformers, self.class_name)


def model_folder(name: str | Path, *, remote_code: bool = False) -> Path:
    """The local folder of "demo", of a path, or of a hub name (fetched into the hub's cache; pickles are never fetched).

    Raises ModelError if there is no such folder, or if the hub does not have it or cannot be reached.
    """
    if name == "demo":
        folder = Path(str(importlib.resources.files("layerwise") / "demo_model"))
        if not folder.is_dir():
            raise ModelError('"demo": this installation of layerwise lacks its demo model. Install it again.')
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f'model "{name}" is a file. Give the folder that holds config.json and the weights.')
    text = str(name)
    hub_like = (
        text.count("/") <= 1 and not text.startswith((".", "~", "/")) and not text.endswith("/") and "\\" not in text
    )
    if isinstance(name, Path) or not hub_like:
        raise ModelError(f'model "{name}": no such folder. Give a folder, a hub name such as owner/model, or demo.')
    return _fetch(text, remote_code)


def _fetch(name: str, remote_code: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if remote_code else _HUB_FILES
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_HUB_VARIANTS))
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f'model "{name}": no such folder here, not in the hub\'s cache, and the hub cannot be reached.'
            " Check the name and the network, or give a local folder or demo."
        ) from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f'model "{name}": the hub gives it only after you accept its terms and log in (hf auth login).'
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f'model "{name}": no such folder, and the hub has no such model (or you may not see it). Check the name.'
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelError(f'model "{name}": fetching it from the hub failed: {str(error).splitlines()[0]}') from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain values. Raises ModelError if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: {_without_config(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{path}: not a model's configuration: a JSON object is needed, not a {type(config).__name__}."
        )
    return config


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class of transformers that a config.json names. With a modelling file of ours that is the class which it makes narrower."""
    name = str(config["architectures"][0])
    own = any(REMOTE_MODULE in str(place) for place in (config.get("auto_map") or {}).values())
    return name.removeprefix(REMOTE_PREFIX) if own else name


def loader_of(folder: Path, *, remote_code: bool = False) -> Loader:
    """The stock class for this folder, from its config.json. Raises ModelError for an architecture that nobody knows."""
    config = read_config(folder)
    if class_name := config.get("_class_name"):
        loader = Loader("diffusers", str(class_name))
        try:
            loader.get()
        except AttributeError as error:
            raise ModelError(
                f'{folder}/config.json: diffusers has no class "{class_name}". A newer diffusers may.'
            ) from error
        return loader
    architectures, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not architectures:
        raise ModelError(
            f'{folder}/config.json: it does not say which class the model is. Add "architectures", such as ["LlamaForCausalLM"].'
        )
    return _transformers_loader(folder, config, architecture_of(config), str(kind), remote_code)


def _transformers_loader(
    folder: Path, config: dict[str, Any], architecture: str, kind: str, remote_code: bool
) -> Loader:
    import transformers
    from transformers.models.auto import modeling_auto

    if auto := config.get("auto_map"):
        names = [name for name in (*_AUTO, *sorted(auto)) if name in auto and name.startswith("AutoModel")]
        if names and remote_code:
            return Loader("transformers", names[0], remote_code=True)
    for name, table in _AUTO.items():
        classes = getattr(modeling_auto, table).get(kind, ())
        if architecture in ((classes,) if isinstance(classes, str) else classes):
            return Loader("transformers", name)
    concrete = getattr(transformers, architecture, None)  # CLIPTextModelWithProjection and such: in no table
    if isinstance(concrete, type) and issubclass(concrete, transformers.PreTrainedModel):
        return Loader("transformers", architecture)
    if auto:
        raise ModelError(
            f'{folder}: "{architecture}" is code that comes with the model. Read its .py files, then allow it: remote_code=True'
            " (--remote-code)."
        )
    known = [c for table in _AUTO.values() for c in getattr(modeling_auto, table).values() if isinstance(c, str)]
    close = difflib.get_close_matches(architecture, known, n=1, cutoff=0.8)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    raise ModelError(
        f'{folder}/config.json: transformers {transformers.__version__} knows no architecture "{architecture}"'
        f' of model type "{kind}".{hint}'
    )


def _without_config(folder: Path) -> str:
    if (folder / "layerwise.json").is_file():
        return "it holds the weights of a model of your own class. Build the model, then layerwise.io.load_into(model, folder)."
    if (folder / "model_index.json").is_file():
        parts = sorted(part.name for part in folder.iterdir() if (part / "config.json").is_file())
        return f"it is a diffusers pipeline. Give one of its models: {', '.join(str(folder / part) for part in parts)}."
    return "no config.json in it. Give the folder of a model that was saved with save_pretrained."
