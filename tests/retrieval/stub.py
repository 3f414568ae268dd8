"""Stand-in for a stage-1 model that compares the colours of images with the words of texts."""

import torch
from PIL import ImageColor

from qformer_captioner.retrieval.model import EncodedImages

from ..fixtures.captioned_files import COLOURS

QUERIES = 3


class ColourModel:
    """Model whose vectors are colours. It counts how many images, texts and pairs it computes."""

    def __init__(self, max_length: int = 8):
        self.device = torch.device("cpu")
        self.max_length = max_length
        self.num_frames = 1
        self.images = self.texts = self.pairs = 0

    def count_tokens(self, texts):
        return [len(text.split()) + 2 for text in texts]

    def image_features(self, pictures):
        self.images += len(pictures)
        colours = torch.tensor([picture.getpixel((0, 0)) for picture in pictures]).float() / 255
        return colours[:, None].repeat(1, 2, 1), None

    def encode_images(self, pictures):
        features, mask = self.image_features(pictures)
        colours = features[:, 0]
        vectors = torch.nn.functional.normalize(torch.cat([colours, torch.ones(len(colours), 1)], dim=1) - 0.5, dim=1)
        others = torch.tensor([0.0, 0.0, 0.0, -1.0]).expand(len(colours), QUERIES - 1, 4)  # far from all texts
        return EncodedImages(torch.cat([others, vectors[:, None]], dim=1), features, mask)

    def encode_texts(self, texts):
        self.texts += len(texts)
        vectors = torch.tensor([[*colour_of(text), 255] for text in texts]).float() / 255 - 0.5
        return torch.nn.functional.normalize(vectors, dim=1)

    def match(self, features, mask, image_of_text, texts):
        self.pairs += len(texts)
        colours = torch.tensor([colour_of(text) for text in texts]).float() / 255
        distance = (features[image_of_text, 0] - colours).norm(dim=1)
        return torch.stack([distance, 1 - distance * torch.tensor(list(map(len, texts)))], dim=1)


def colour_of(text):
    return ImageColor.getrgb(next(word for word in text.split() if word in COLOURS))
