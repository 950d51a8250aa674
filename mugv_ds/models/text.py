"""Text features: the prompts' fixed parts, the T5 encoder, and an encoder that needs no weights.

Shape suffixes: B texts, L text tokens, C width of the features.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.config.text_encoder import TextEncoderInfo
from mugv_ds.models.t5_fingerprint import t5_fingerprint

logger = logging.getLogger(__name__)

# Published sampler defaults: the unconditional branch of guidance, and what is appended to every prompt.
NEGATIVE_PROMPT = (
    "ugly, blurry, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry"
)
PROMPT_SUFFIX = " aesthetic score: 6.0."

# The published encoder. Its main revision has no safetensors, this one has.
PUBLISHED_T5 = ("DeepFloyd/t5-v1_1-xxl", "23ed28cddf2348992461bcda9922f53e8c8d4d59")
MAX_TOKENS = 300  # of the published features

_MAX_LAYERS, _MAX_WIDTH = 1 << 10, 1 << 20  # beyond any use
_T5_FAMILY = ("t5", "mt5", "umt5")
_POSITION_SCALE = 0.1  # positions tell word orders apart and must not drown the words


class T5TextEncoder:
    """Encodes texts by the last hidden state of a T5 encoder; source: [C] of the specification, §3.

    Texts are taken as they are: case, tags and line breaks stay. Each is encoded at its own length, which gives the
    features of a padded one. Nothing is downloaded, and no code of the folder is run.

    Args:
        source: a folder with `config.json`, safetensors and a tokenizer, or the name of one in the hub's local cache
            (such as `PUBLISHED_T5`).
        revision: of a name, which must have one: names may come to mean other weights.
        dtype: float32, as the published sampler computes, or bfloat16, as the published data preparation does. Features
            for training and for sampling should be made in the same one.
        device: where to.
        max_tokens: L, the length that texts are padded or cut to; the end token stays the last.
        batch_size: texts of one length that are encoded together.
        device_map, offload_folder: spread the weights over devices, memory and disk with accelerate, instead of
            `device`; see `from_pretrained` of transformers. "auto" is what helps where the weights do not fit.

    Attributes:
        channels: C, the width of the features. max_tokens: L.

    Raises:
        InputError: `source` is not a T5 encoder that can be read whole, or the dtype is another.
    """

    def __init__(
        self,
        source: str | Path,
        revision: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 32,
        device_map: str | dict | None = None,
        offload_folder: str | Path | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"T5 in {dtype}: must be float32 or bfloat16, its activations overflow float16")
        if max_tokens < 2 or batch_size < 1:
            raise InputError(f"max_tokens = {max_tokens}, batch_size = {batch_size}: must be at least 2 and 1")
        self._name, self._revision = _checked_source(source, revision), revision
        self.max_tokens, self._batch_size = max_tokens, batch_size
        self._tokenizer, self._model = _load_t5(
            self._name, revision, dtype=dtype, device_map=device_map, offload_folder=offload_folder
        )
        if device_map is None:
            self._model.to(device)
        self.channels = self._model.config.d_model

    @cached_property
    def info(self) -> TextEncoderInfo:
        """What this encoder is, to be kept with its features and compared where they are used.

        Raises:
            InputError: its files, of which some rows are read, are gone.
        """
        model = self._model
        return _t5_info(self._name, self._revision, model.config, self._tokenizer, model.dtype, self.max_tokens)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encodes texts; warns how many of them are cut.

        Returns:
            features fp32 [B, L, C], zero beyond the text; mask bool [B, L], True on tokens. Both are on the CPU.

        Raises:
            InputError: a text is empty or blank, or its features are not finite.
        """
        ids = self.tokens(texts)
        features_BLC = torch.zeros(len(texts), self.max_tokens, self.channels)
        mask_BL = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for length, rows in groupby(sorted(range(len(ids)), key=lambda row: len(ids[row])), lambda row: len(ids[row])):
            for batch in torch.tensor(list(rows)).split(self._batch_size):
                given = torch.tensor([ids[row] for row in batch], device=self._model.device)
                feature_blC = self._model(input_ids=given).last_hidden_state.float().cpu()
                self._refuse_infinite(feature_blC, [texts[row] for row in batch])
                features_BLC[batch, :length] = feature_blC
                mask_BL[batch, :length] = True
        return features_BLC, mask_BL

    def tokens(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of texts, each cut to `max_tokens`, the end token included, and not padded.

        Raises:
            InputError: a text is empty or blank.
        """
        for row, text in enumerate(texts):
            if not text.strip():
                raise InputError(f"text {row} is empty: give a caption, or leave the sample out")
        ids = [self._tokenizer(text, verbose=False)["input_ids"] for text in texts]
        cut = sum(len(one) > self.max_tokens for one in ids)
        if cut:
            logger.warning("%d of %d texts are cut to %d tokens", cut, len(texts), self.max_tokens)
        return [one if len(one) <= self.max_tokens else [*one[: self.max_tokens - 1], one[-1]] for one in ids]

    def length(self, text: str) -> int:
        """Returns how many tokens a text has, uncut, with the end token."""
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _refuse_infinite(self, feature_blC: Tensor, texts: list[str]) -> None:
        for feature_lC, text in zip(feature_blC, texts, strict=True):
            if not feature_lC.isfinite().all():
                raise InputError(
                    f"{self._name}: features that are not finite in {self._model.dtype} for {text[:80]!r}; the weights "
                    "may be damaged: compare their checksum, or use float32"
                )


class HashTextEncoder:
    """Encodes texts without weights: each word becomes a fixed random vector, plus a faint sinusoid of its position.

    The same text gives the same features on every machine. It is called as the T5 encoder is.

    Args:
        channels: C, the width of the features; even.
        max_tokens: length that texts are padded to.

    Attributes:
        info: what it is; see `T5TextEncoder.info`.

    Raises:
        ValueError: `channels` is odd or not positive.
    """

    def __init__(self, channels: int, max_tokens: int) -> None:
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be even and positive, got {channels}")
        self.channels = channels
        self.max_tokens = max_tokens
        self._positions = _POSITION_SCALE * _sinusoid(max_tokens, channels)
        vector = _word_vector("circle", channels).numpy()  # all the others are drawn as it is
        self.info = TextEncoderInfo(
            kind="hash",
            name=f"of width {channels}",
            dtype="float32",
            max_tokens=max_tokens,
            fingerprint=hashlib.sha256(vector.tobytes()).hexdigest(),
        )

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encodes a batch of texts.

        Returns:
            features fp32 [B, max_tokens, channels], zero beyond the text; mask bool [B, max_tokens], True on words.

        Raises:
            InputError: a text has no words, or more than `max_tokens`.
        """
        features_BLC = torch.zeros(len(texts), self.max_tokens, self.channels)
        mask_BL = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = _words(text)
            if not 1 <= len(words) <= self.max_tokens:
                raise InputError(f"text must have 1 to {self.max_tokens} words, got {len(words)}: {text[:80]!r}")
            vectors = torch.stack([_word_vector(word, self.channels) for word in words])
            features_BLC[row, : len(words)] = vectors + self._positions[: len(words)]
            mask_BL[row, : len(words)] = True
        return features_BLC, mask_BL

    def length(self, text: str) -> int:
        """Returns how many words a text has."""
        return len(_words(text))


def read_text_encoder_info(
    source: str | Path, *, channels: int, max_tokens: int, revision: str | None = None, dtype: torch.dtype
) -> TextEncoderInfo:
    """Returns the `info` that `load_text_encoder` with these arguments has; of a T5 no weights are loaded.

    Raises:
        InputError: see `load_text_encoder`.
    """
    if source == "hash":
        return HashTextEncoder(channels, max_tokens).info
    encoder_files(source, revision)
    name = _checked_source(source, revision)
    config = _read_config(name, revision, channels)
    return _t5_info(name, revision, config, _read_tokenizer(name, revision, config), dtype, max_tokens)


def load_text_encoder(
    source: str | Path,
    *,
    channels: int,
    max_tokens: int,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    device_map: str | dict | None = None,
    offload_folder: str | Path | None = None,
) -> T5TextEncoder | HashTextEncoder:
    """Returns the text encoder of a model.

    Args:
        source: "hash" for the demo's encoder, which needs no weights and ignores what only a T5 takes; else see
            `T5TextEncoder`, as for the other arguments.
        channels: C, the width of the features that the model takes.

    Raises:
        InputError: the encoder has another width, which is known before its weights are read; or see `T5TextEncoder`.
    """
    if source == "hash":
        return HashTextEncoder(channels, max_tokens)
    _read_config(_checked_source(source, revision), revision, channels)
    return T5TextEncoder(
        source,
        revision,
        dtype=dtype,
        device=device,
        max_tokens=max_tokens,
        device_map=device_map,
        offload_folder=offload_folder,
    )


def encoder_files(source: str | Path, revision: str | None = None) -> list[Path]:
    """Returns the files that a T5 encoder is read from, by name; none is read, but each can be opened.

    Args:
        source, revision: see `T5TextEncoder`.

    Raises:
        InputError: there is no such folder, and the hub's cache has no such name, or one of the files is no file.
    """
    name = _checked_source(source, revision)
    with _named(name):
        folder = _folder_of(name, revision)
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".model", ".safetensors"))
        for path in files:
            open_regular(path).close()
    return files


def save_features(path: str | Path | BinaryIO, y: Tensor, mask: Tensor) -> None:
    """Writes one text's features in the published format, without the padding.

    Args:
        path: file to write; an open one gives the same bytes whatever its name.
        y: features [max_tokens, C].
        mask: bool [max_tokens], True on real tokens.
    """
    tokens = y[mask].unsqueeze(0).unsqueeze(0)
    torch.save({"y": tokens, "mask": torch.ones(1, tokens.shape[2], dtype=torch.int64)}, path)


def _checked_source(source: str | Path, revision: str | None) -> str:
    """Returns the folder or the name as transformers takes it."""
    if Path(source).is_dir():
        return str(source)
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise InputError(f"{source}: is no folder, nor a name such as {PUBLISHED_T5[0]}")
    if not revision:
        raise InputError(f"{source}: is no folder, and a name needs a revision, best a commit's hash")
    return source


def _local(revision: str | None) -> dict:
    """What keeps transformers from asking the hub, and from running code of a folder."""
    return {"revision": revision or "main", "local_files_only": True, "trust_remote_code": False}


def _folder_of(name: str, revision: str | None) -> Path:
    """Returns the folder that a checked source lies in."""
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name).resolve()
    return Path(snapshot_download(name, revision=revision, local_files_only=True)).resolve()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns what transformers raises of a bad folder into one line."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{name}: is not a T5 encoder with safetensors that is here whole, and nothing is downloaded (`hf download "
            f"NAME --revision REVISION` does): {reason}"
        ) from None


def _read_config(name: str, revision: str | None, channels: int | None = None):
    """Returns the config of transformers, of this width if one is given. It is imported here: that takes seconds."""
    from transformers import AutoConfig

    with _named(name):
        config = AutoConfig.from_pretrained(name, **_local(revision))
    if config.model_type not in _T5_FAMILY:
        raise InputError(f"{name}: a {config.model_type} model, expected one of {', '.join(_T5_FAMILY)}")
    for size in ("num_layers", "num_heads", "d_model", "d_kv", "d_ff", "vocab_size"):
        value, most = getattr(config, size), _MAX_LAYERS if size == "num_layers" else _MAX_WIDTH
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"{name}: config.json: {size} = {value!r}: must be whole, from 1 to {most:,}")
    if channels not in (None, config.d_model):
        raise InputError(
            f"{name}: makes features of width {config.d_model}, and the model takes {channels}; use its encoder"
        )
    return config


def _load_t5(name: str, revision: str | None, *, dtype: torch.dtype, **placement) -> tuple:
    """Returns tokenizer and encoder."""
    from transformers import AutoModelForTextEncoding

    config, local = _read_config(name, revision), _local(revision)
    tokenizer = _read_tokenizer(name, revision, config)
    with _named(name):
        model, report = AutoModelForTextEncoding.from_pretrained(
            name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement, **local
        )
    if absent := sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])):
        raise InputError(f"{name}: has no {absent[0]} of the right shape ({len(absent)} such weights); it is not whole")
    return tokenizer, model.eval().requires_grad_(False)


def _read_tokenizer(name: str, revision: str | None, config):
    """Returns the tokenizer. Without its file transformers makes one that knows no word, and says nothing."""
    from transformers import AutoTokenizer

    with _named(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **_local(revision))
    unknown = tokenizer.unk_token_id in tokenizer("a video of a person walking", verbose=False)["input_ids"]
    if unknown or len(tokenizer) > config.vocab_size:
        raise InputError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens{', none for common words,' if unknown else ''} and the "
            f"model {config.vocab_size}; put the model's own spiece.model into the folder"
        )
    return tokenizer


def _t5_info(
    name: str, revision: str | None, config, tokenizer, dtype: torch.dtype, max_tokens: int
) -> TextEncoderInfo:
    """Returns what a T5 encoder is that computes in `dtype`; of its weights some rows are read."""
    from safetensors import SafetensorError

    try:
        folder = _folder_of(name, revision)
        fingerprint, stored = t5_fingerprint(folder, config, tokenizer)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name}: cannot be read: {' '.join(str(error).split())[:300]}") from None
    called, commit = folder.name, None
    if folder.parent.name == "snapshots":  # of the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        called, commit = folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    narrowest = min([dtype, *stored], key=lambda dtype: dtype.itemsize)
    return TextEncoderInfo(
        kind="t5",
        name=called,
        revision=commit,
        dtype=str(narrowest).removeprefix("torch."),
        max_tokens=max_tokens,
        fingerprint=fingerprint,
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _word_vector(word: str, channels: int) -> Tensor:
    """Draws a standard normal [channels] from a counter-based generator keyed by the word."""
    key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest(), "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(channels, dtype=np.float32))


def _sinusoid(length: int, channels: int) -> Tensor:
    """Returns the sinusoidal positions [length, channels] of Vaswani et al. 2017 (section 3.5), cosines first."""
    frequencies = 10000 ** (-torch.arange(channels // 2) / (channels // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
