"""Networks of Pix2Pix and CycleGAN: the authors' modules and names, dropout, patches and image sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide import create
from fieldguide.checkpoints.identify import recognize
from fieldguide.checkpoints.weights import get_tables, read_ours, translate


class Level(nn.Module):
    """A level of the U-Net, which holds the next one, as a sequence of layers; the input is joined to the output."""

    def __init__(self, outer: int, inner: int, inside: nn.Module | None, inputs: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.outermost = inputs is not None
        down: list[nn.Module] = [nn.Conv2d(inputs or outer, inner, 4, 2, 1, bias=False)]
        up: list[nn.Module] = [
            nn.ReLU(),
            nn.ConvTranspose2d(2 * inner if inside else inner, outer, 4, 2, 1, bias=self.outermost),
        ]
        if self.outermost:
            up.append(nn.Tanh())
        else:
            down.insert(0, nn.LeakyReLU(0.2))
            if inside is not None:
                down.append(nn.BatchNorm2d(inner))
            up.append(nn.BatchNorm2d(outer))
        if dropout:
            up.append(nn.Dropout(dropout))
        self.model = nn.Sequential(*down, *([inside] if inside else []), *up)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class AuthorsUNet(nn.Module):
    """The authors' network: from the lowest level outwards; levels of full width but the lowest have dropout."""

    def __init__(self, inputs: int, outputs: int, halvings: int, dim: int, dropout: float):
        super().__init__()
        level = Level(8 * dim, 8 * dim, None)
        for _ in range(halvings - 5):
            level = Level(8 * dim, 8 * dim, level, dropout=dropout)
        for times in (4, 2, 1):
            level = Level(times * dim, 2 * times * dim, level)
        self.model = Level(outputs, dim, level, inputs=inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def build_authors_patchgan(channels: int, dim: int, layers: int, norm: type[nn.Module]) -> nn.Module:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            has_bias = norm is nn.InstanceNorm2d
            parts: list[nn.Module] = [nn.Conv2d(channels, dim, 4, 2, 1), nn.LeakyReLU(0.2)]
            width = dim
            for n in range(1, layers + 1):
                wider = dim * min(2**n, 8)
                parts += [nn.Conv2d(width, wider, 4, 2 if n < layers else 1, 1, bias=has_bias), norm(wider), nn.LeakyReLU(0.2)]
                width = wider
            self.model = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    return Wrapper()


class ResidualBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        part = lambda: [nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3), nn.InstanceNorm2d(dim)]
        self.conv_block = nn.Sequential(*part(), nn.ReLU(), *part())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class AuthorsResNet(nn.Module):
    def __init__(self, inputs: int, outputs: int, dim: int, blocks: int):
        super().__init__()
        norm = lambda width: [nn.InstanceNorm2d(width), nn.ReLU()]
        parts: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(inputs, dim, 7), *norm(dim)]
        for width in (dim, 2 * dim):
            parts += [nn.Conv2d(width, 2 * width, 3, 2, 1), *norm(2 * width)]
        parts += [ResidualBlock(4 * dim) for _ in range(blocks)]
        for width in (4 * dim, 2 * dim):
            parts += [nn.ConvTranspose2d(width, width // 2, 3, 2, 1, output_padding=1), *norm(width // 2)]
        self.model = nn.Sequential(*parts, nn.ReflectionPad2d(3), nn.Conv2d(dim, outputs, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def randomize(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0))
    return model


def compare(ours: nn.Module, theirs: nn.Module, image: Tensor) -> None:
    """Compare outputs and gradients of one image, after ours got the weights by the authors' names."""
    ours, theirs = ours.double(), randomize(theirs.double()).train()
    ours.load_state_dict(read_ours(ours, theirs.state_dict(), "junyanz"))
    weights = torch.randn(theirs(image).shape, dtype=torch.float64)
    outputs, gradients = [], []
    for network in (ours, theirs):
        output = network(image)
        (output * weights).sum().backward()
        outputs.append(output.detach())
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert (outputs[0] - outputs[1]).abs().max() < 1e-9
    back = translate(gradients[0], get_tables(ours)["junyanz"], reverse=True)
    assert back.keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert torch.allclose(back[name], gradient, atol=1e-7), name


@pytest.mark.parametrize(("halvings", "sides"), [(5, (32, 64)), (7, (128, 128))])
def test_unet_equals_the_authors_modules_by_their_names(halvings, sides):
    """One image: batch norm of one image is instance norm. Dropout is compared below."""
    torch.manual_seed(0)
    ours = create("pix2pix-test", channels=3, outputs=2, dim=2, depth=halvings, dropout=0.0)
    if halvings == 7:  # the lowest map has one pixel, and its neighbors few: statistics of a single value are not defined
        sides = (256, 256)
    compare(ours, AuthorsUNet(3, 2, halvings, 2, 0.0), torch.randn(1, 3, *sides, dtype=torch.float64))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_critic_equals_the_authors_modules_by_their_names(norm):
    torch.manual_seed(0)
    ours = create("patchgan-70", channels=4, dim=3, scaled=norm is nn.BatchNorm2d)
    compare(ours, build_authors_patchgan(4, 3, 3, norm), torch.randn(1, 4, 64, 48, dtype=torch.float64))


def test_residual_generator_equals_the_authors_modules_by_their_names():
    torch.manual_seed(0)
    ours = create("cyclegan-9", channels=3, outputs=1, dim=2, depth=3)
    compare(ours, AuthorsResNet(3, 1, 2, 3), torch.randn(1, 3, 20, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", ["pix2pix-256", "pix2pix-128", "cyclegan-9", "cyclegan-6", "patchgan-70-pairs", "patchgan-70"])
def test_files_of_the_authors_are_recognized(name):
    """The files hold running statistics, which are not used: of batch norm, and of instance norm before torch 0.4."""
    with torch.device("meta"):
        state = {
            "pix2pix-256": lambda: AuthorsUNet(3, 3, 8, 64, 0.5),
            "pix2pix-128": lambda: AuthorsUNet(3, 3, 7, 64, 0.5),
            "cyclegan-9": lambda: AuthorsResNet(3, 3, 64, 9),
            "cyclegan-6": lambda: AuthorsResNet(3, 3, 64, 6),
            "patchgan-70-pairs": lambda: build_authors_patchgan(6, 64, 3, nn.BatchNorm2d),
            "patchgan-70": lambda: build_authors_patchgan(3, 64, 3, nn.InstanceNorm2d),
        }[name]().state_dict()
        if name.startswith("cyclegan"):
            state |= {"model.2.running_mean": torch.zeros(64), "model.10.conv_block.2.running_var": torch.ones(256)}
    card, size, origin, changes = recognize(state, "latest_net_G.pth")
    assert (size, origin, changes) == (name, "junyanz", {}) and size in card.sizes


def test_dropout_maps_are_given_or_drawn_in_training():
    torch.manual_seed(0)
    network = create("pix2pix-test", dim=2, depth=6, channels=3).eval()
    image = torch.randn(2, 3, 64, 100)
    assert len(network.dropout_shapes(64, 100)) == 1  # levels of full width, but the lowest
    shapes = network.dropout_shapes(64, 100)
    assert torch.equal(network(image), network(image))
    ones = [torch.ones(2, *shape) for shape in shapes]
    given = [torch.rand(2, *shape) for shape in shapes]
    assert torch.equal(network(image, given)[1:], network(image[1:], [draw[1:] for draw in given]))
    assert not torch.allclose(network(image, given), network(image, ones))
    # Nothing is dropped, but values are scaled as in training: twice those of evaluation before the next convolution.
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = network(image)
        torch.manual_seed(3)
        x = torch.ones(2, *shapes[0])
        kept = F.dropout(x, 0.5, True) > 0
    assert torch.allclose(drawn, network.eval()(image, [kept.float()]), atol=1e-6)


def test_a_score_depends_on_a_patch_of_70_pixels():
    critic = create("patchgan-70", channels=1, dim=4).double()
    for module in critic.modules():  # norms see whole images
        if isinstance(module, nn.InstanceNorm2d):
            module.forward = lambda x: x  # type: ignore[method-assign]
    image = torch.randn(1, 1, 160, 160, dtype=torch.float64, requires_grad=True)
    scores = critic(image)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


@pytest.mark.parametrize("name", ["pix2pix-mini", "cyclegan-mini"])
def test_output_has_the_size_of_the_image(name):
    network = create(name, channels=1, outputs=3).eval()
    assert network(torch.randn(1, 1, 21, 50)).shape == (1, 3, 21, 50)
