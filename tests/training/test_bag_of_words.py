"""The word loss: which words do the queries speak for?"""

import pytest
import torch

from qformer_captioner.training.bag_of_words import BagOfWordsLoss

EMBEDDINGS = torch.eye(8) * 2
DOG, CAT, RARE = 3, 4, 5
CAPTIONS = [[DOG, 1]] * 10 + [[CAT, 1]] * 10 + [[RARE, 1]]


@pytest.fixture
def words():
    return BagOfWordsLoss(CAPTIONS, EMBEDDINGS)


def speaking_for(word: int, queries: int = 3) -> torch.Tensor:
    """A soft prompt `[1, Q, D]` of which one query is the embedding of a word and the others are silent."""
    prompt = torch.zeros(1, queries, 8)
    prompt[0, 1] = EMBEDDINGS[word]
    return prompt


def test_speaking_for_the_captions_word_is_rewarded_and_for_another_punished(words):
    caption = torch.tensor([[DOG, 1, -100]])
    right, silent, wrong = (
        words(prompt, caption) for prompt in (speaking_for(DOG), torch.zeros(1, 3, 8), speaking_for(CAT))
    )
    assert right < silent < wrong


def test_silence_leaves_every_word_at_its_frequency(words):
    frequency = torch.tensor([21, 10, 10]) / 21  # of the words 1, DOG and CAT
    frequency = frequency.clamp(1e-4, 1 - 1e-4)
    expected = -(frequency[0].log() + frequency[1].log() + (1 - frequency[2]).log())
    assert words(torch.zeros(1, 3, 8), torch.tensor([[1, DOG]])).item() == pytest.approx(expected.item(), rel=1e-4)


def test_words_of_few_captions_are_left_out(words):
    assert words.tokens.tolist() == [1, DOG, CAT]


def test_missing_captions_do_not_count(words):
    one = torch.tensor([[[DOG, 1]]])
    padded = torch.tensor([[[DOG, 1, -100], [-100, -100, -100]]])
    assert torch.equal(words(speaking_for(DOG), one), words(speaking_for(DOG), padded))


def test_a_word_in_one_of_two_captions_is_half_a_word(words):
    prompt = speaking_for(DOG)
    both, neither = torch.tensor([[[DOG, CAT]] * 2]), torch.tensor([[[RARE, RARE]] * 2])
    half = torch.tensor([[[DOG, CAT], [RARE, RARE]]])
    mean = (words(prompt, both) + words(prompt, neither)) / 2
    assert words(prompt, half).item() == pytest.approx(mean.item(), rel=1e-5)


def test_the_gradient_reaches_the_soft_prompt(words):
    prompt = torch.zeros(1, 3, 8, requires_grad=True)
    words(prompt, torch.tensor([[DOG, 1]])).backward()
    assert prompt.grad[0, :, DOG].lt(0).all() and prompt.grad[0, :, CAT].gt(0).all()


def test_the_loss_hears_what_is_said_and_not_how_loud():
    embeddings = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    words = BagOfWordsLoss([[7, 2], [7, 3, 2]] * 5, embeddings)
    soft_prompt = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[7, 2, -100], [7, 3, 2]])
    torch.testing.assert_close(words(soft_prompt, labels), words(100 * soft_prompt, labels))


def test_it_is_computed_on_the_soft_prompts_device(words):
    prompt, caption = speaking_for(DOG), torch.tensor([[DOG, 1]])
    with torch.device("meta"):  # where a tensor ends up that is made without saying where
        loss = words(prompt, caption)
    assert loss.device.type == "cpu"
