"""Text about images from a pretrained vision-language model, with its tokenizer and image preprocessing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fieldguide.checkpoints.generation_config import PublishedGeneration, read_generation_config
from fieldguide.checkpoints.load import Checkpoint, build_network, inspect_checkpoint
from fieldguide.checkpoints.preprocessor_config import build_native_transform, build_transform
from fieldguide.core import distributed
from fieldguide.core.card import Card
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.core.options import PREDICT_ALIASES, parse_options
from fieldguide.core.signature import Signature
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.data.preprocessing.chat_template import ChatTemplate
from fieldguide.data.preprocessing.tokenizer_files import TokenizerFiles
from fieldguide.inference.predictor import Predictions, Predictor, as_list, join_skipped
from fieldguide.inference.signature import describe_image_to_text
from fieldguide.inference.text_generation import build_chat_template, find_end_tokens, read_tokenizer
from fieldguide.models.generation import Greedy, generate_batch
from fieldguide.models.generation.stop_strings import truncate_at_stop
from fieldguide.tasks.multimodal.pretrained import build_task

if TYPE_CHECKING:
    from torch import Tensor

    from fieldguide.core.card import Network
    from fieldguide.models.generation.sampling import GenerativeModel

    class VisionLanguageNetwork(Network):
        """The type of the networks that can be loaded here."""

        def expand_image_tokens(self, tokens: Sequence[int], sizes: Sequence[tuple[int, int]] = ...) -> list[int]: ...
        def with_images(self, image: Tensor, **sizes: Tensor) -> GenerativeModel: ...


IMAGES_PER_BATCH = 4  # each image is many tokens


class ImageToText(Predictor):
    """A vision-language model that answers the same prompt for each image. `image_token` stands for the image in prompts."""

    LOAD_OPTIONS: ClassVar[dict[str, type]] = {"max_pixels": int}
    config_type: ClassVar[type] = Greedy

    def __init__(
        self,
        network: VisionLanguageNetwork,
        files: TokenizerFiles,
        transform: ImageTransform,
        template: ChatTemplate | None = None,
        card: Card | None = None,
        published: PublishedGeneration | None = None,
    ):
        self.network, self.text, self.template = (
            network.to(distributed.device()).eval(),
            TextTokenizer(files.tokenizer),
            template,
        )
        image_token = files.tokenizer.id_to_token(network.config.picture)
        assert image_token is not None  # checked by `load`
        self.begin, self.image_token = files.special.get("bos_token"), image_token
        self.end_tokens, self.card, self.published = find_end_tokens(files), card, published or PublishedGeneration()
        self.task = build_task(self.text, transform, self.text.end, network.config.length)

    @classmethod
    def load(cls, checkpoint: str | Path | Checkpoint, max_pixels: int | None = None, **overrides: Any) -> ImageToText:
        """Load a folder of transformers with its tokenizer, or hf:organization/name.

        `max_pixels` limits the size of images, for networks that read any size; without it, the published limit applies.
        Raises `WeightsError` if the network does not generate text from images, or its tokenizer is missing or belongs to
        another network, and `SettingsError` for `max_pixels` of a network with a fixed size.
        """
        found = checkpoint if isinstance(checkpoint, Checkpoint) else inspect_checkpoint(checkpoint)
        card = found.card
        if card.input_type != "captioned" or "tokens" not in card.output_types:
            raise WeightsError(
                f"{found.path} is {card.name}, which maps {card.input_type} to {' or '.join(card.output_types)}; image-to-text "
                "needs a network that reads images with tokens and predicts the next token."
            )
        filled_network = build_network(card, {**found.values, **overrides}, found.state, found.origin, str(found.path))
        network = cast("VisionLanguageNetwork", filled_network)  # all networks with this input and output have its methods
        folder, c = found.path if found.path.is_dir() else found.path.parent, network.config
        files = read_tokenizer(found)
        size = files.tokenizer.get_vocab_size()
        if size > c.vocab_size or files.tokenizer.id_to_token(c.picture) is None:
            raise WeightsError(
                f"{folder}: the tokenizer has {size:,} tokens, but the network {c.vocab_size:,} with {c.picture:,} as the image "
                "token: the tokenizer belongs to another network."
            )
        transform = build_transform_of(card, c, folder, max_pixels)
        published = read_generation_config(folder, is_encoder_decoder=False)
        return cls(network, files, transform, build_chat_template(files), card, published)

    @property
    def model(self) -> VisionLanguageNetwork:
        return self.network

    @functools.cached_property
    def signature(self) -> Signature:
        return describe_image_to_text(self)

    def format_prompt(self, prompt: str) -> str:
        """Return the text that the network reads.

        A prompt that contains the image token is used as it is. Otherwise it becomes a user message if the model has a chat
        template, else the image token and the prompt on the next line.
        """
        if self.image_token in prompt:
            return prompt
        if self.template is None:
            return f"{self.image_token}\n{prompt}"
        return self.template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}])

    def tokens(self, prompt: str, size: tuple[int, int] | None = None) -> list[int]:
        """Return the token ids of a prompt, with one image token per patch of an image of this size (height, width).

        Without a size, it is the network's usual one. Raises `SettingsError` for several images.
        """
        text = self.format_prompt(prompt)
        if (count := text.count(self.image_token)) != 1:
            raise SettingsError(
                f"prompt={prompt!r} contains {self.image_token} {count} times; one image at a time is supported."
            )
        has_begin = bool(self.begin and text.startswith(self.begin))  # from a template that writes special tokens itself
        ids = self.text.tokenizer.encode(text, add_special_tokens=not has_begin).ids
        return self.network.expand_image_tokens(ids, () if size is None else (size,))

    def predict(self, inputs: Any = (), prompt: str = "", **options: Any) -> Predictions:
        """Return `input` and `text` for each image; decoding is greedy by default.

        `inputs` is a path or a list of them; folders hold many images. `options` are those of `GenerationConfig`. An answer
        ends at the latest at the network's maximum length. Raises `SettingsError` without a prompt, or if it is too long.
        """
        parsed = parse_options(Greedy, options, owner="a vision-language model", aliases=PREDICT_ALIASES)
        Greedy(**parsed)  # raises for values that exclude each other
        if not prompt:
            raise SettingsError('no prompt: set --set prompt="What is this?"')
        self.tokens(prompt)  # reports a wrong prompt before images are read
        data, length = self.task.read(as_list(inputs)), self.network.config.length
        paths, device, found = data.rows[self.task.column].to_list(), distributed.device(), []
        transform = self.task.pictures
        for first in range(0, len(paths), IMAGES_PER_BATCH):
            pixels = transform.load_each(paths[first : first + IMAGES_PER_BATCH])
            rows = [self.tokens(prompt, (image.shape[1], image.shape[2])) for image in pixels]
            longest = max(map(len, rows))
            if longest >= length:
                raise SettingsError(
                    f"the prompt has {longest:,} tokens including the image, but the network reads {length:,} in all, with the "
                    "answer: shorten the prompt."
                )
            config = self.published.apply(Greedy, parsed, longest)
            config = replace(config, max_new_tokens=min(config.max_new_tokens, length - longest))
            batch = {name: x.to(device) for name, x in transform.collate([[image] for image in pixels]).items()}
            generated = generate_batch(
                self.network.with_images(**batch),
                rows,
                config,
                eos_token_ids=self.end_tokens,
                decode=self.text.decode,
                row_ids=range(first, first + len(rows)),
                rules=self.published.rules,
            )
            found += [{"text": truncate_at_stop(self.text.decode(tokens), config.stop_list).strip()} for tokens in generated]
        return Predictions(join_skipped(data, found), self.published.notes)


def build_transform_of(card: Card, config: Any, folder: Path, max_pixels: int | None = None) -> ImageTransform:
    """Return the image preprocessing that the files next to the weights describe, for a network with this config.

    Raises `SettingsError` for `max_pixels` of a network that reads images of one size.
    """
    if "grid" in card.optional_inputs:
        return build_native_transform(folder, config.patch, config.merge, config.image, config.channels, card.scale, max_pixels)
    if max_pixels is not None:
        raise SettingsError(f"max_pixels: {card.name} reads images of {config.image} x {config.image} pixels. Leave it out.")
    return build_transform(folder, config.image, config.channels, card.scale)
