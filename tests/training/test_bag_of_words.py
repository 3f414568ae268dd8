"""The bag-of-words loss: which tokens of the captions do the query tokens predict?"""

import pytest
import torch

from qformer_captioner.training.bag_of_words import BagOfWordsLoss

EMBEDDINGS = torch.eye(8) * 2
DOG, CAT, RARE = 3, 4, 5
CAPTIONS = [[DOG, 1]] * 10 + [[CAT, 1]] * 10 + [[RARE, 1]]


@pytest.fixture
def loss():
    return BagOfWordsLoss(CAPTIONS, EMBEDDINGS)


def soft_prompt_for(token: int, queries: int = 3) -> torch.Tensor:
    """Return a soft prompt `[1, Q, D]` with one query equal to the embedding of a token and zeros elsewhere."""
    prompt = torch.zeros(1, queries, 8)
    prompt[0, 1] = EMBEDDINGS[token]
    return prompt


def test_the_token_of_the_caption_lowers_the_loss_and_another_raises_it(loss):
    caption = torch.tensor([[DOG, 1, -100]])
    prompts = (soft_prompt_for(DOG), torch.zeros(1, 3, 8), soft_prompt_for(CAT))
    right, empty, wrong = (loss(prompt, caption) for prompt in prompts)
    assert right < empty < wrong


def test_an_empty_soft_prompt_leaves_every_token_at_its_frequency(loss):
    frequency = torch.tensor([21, 10, 10]) / 21  # of the tokens 1, DOG and CAT
    frequency = frequency.clamp(1e-4, 1 - 1e-4)
    expected = -(frequency[0].log() + frequency[1].log() + (1 - frequency[2]).log())
    assert loss(torch.zeros(1, 3, 8), torch.tensor([[1, DOG]])).item() == pytest.approx(expected.item(), rel=1e-4)


def test_tokens_of_few_captions_are_ignored(loss):
    assert loss.tokens.tolist() == [1, DOG, CAT]


def test_missing_captions_are_ignored(loss):
    one = torch.tensor([[[DOG, 1]]])
    padded = torch.tensor([[[DOG, 1, -100], [-100, -100, -100]]])
    assert torch.equal(loss(soft_prompt_for(DOG), one), loss(soft_prompt_for(DOG), padded))


def test_a_token_of_one_of_two_captions_has_the_target_one_half(loss):
    prompt = soft_prompt_for(DOG)
    both, neither = torch.tensor([[[DOG, CAT]] * 2]), torch.tensor([[[RARE, RARE]] * 2])
    half = torch.tensor([[[DOG, CAT], [RARE, RARE]]])
    mean = (loss(prompt, both) + loss(prompt, neither)) / 2
    assert loss(prompt, half).item() == pytest.approx(mean.item(), rel=1e-5)


def test_the_gradient_reaches_the_soft_prompt(loss):
    prompt = torch.zeros(1, 3, 8, requires_grad=True)
    loss(prompt, torch.tensor([[DOG, 1]])).backward()
    assert prompt.grad[0, :, DOG].lt(0).all() and prompt.grad[0, :, CAT].gt(0).all()


def test_the_loss_depends_on_the_direction_of_a_soft_prompt_and_not_on_its_norm():
    embeddings = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    loss = BagOfWordsLoss([[7, 2], [7, 3, 2]] * 5, embeddings)
    soft_prompt = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[7, 2, -100], [7, 3, 2]])
    torch.testing.assert_close(loss(soft_prompt, labels), loss(100 * soft_prompt, labels))


def test_the_loss_is_computed_on_the_device_of_the_soft_prompt(loss):
    prompt, caption = soft_prompt_for(DOG), torch.tensor([[DOG, 1]])
    with torch.device("meta"):  # the device of a tensor that is created without naming one
        value = loss(prompt, caption)
    assert value.device.type == "cpu"


def test_the_loss_of_captions_without_frequent_tokens_is_zero():
    prompt = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = BagOfWordsLoss([[DOG, 1], [CAT, 2]], EMBEDDINGS)(prompt, torch.tensor([[DOG, 1], [CAT, 2]]))
    loss.backward()
    assert loss == 0 and torch.equal(prompt.grad, torch.zeros_like(prompt))
