import pytest
import torch
from torch import nn

from consistency.models.register import build, describe_network, find, register_network, register_parametrization


def test_the_name_cannot_be_forgotten():
    for register in (register_network, register_parametrization):
        with pytest.raises(ValueError, match="needs a name"):

            @register
            class Nameless(nn.Module):
                pass


def test_arguments_are_noted_defaults_and_further_ones_too():
    @register_network("noted_in_a_test")
    class Noted(nn.Module):
        def __init__(self, width, *, depth=2, **more):
            super().__init__()
            self.layer = nn.Linear(width, depth)
            more["added"] = 1  # what the constructor does to its arguments is not noted

    described = describe_network(Noted(3, scale=(1, 2)))
    arguments = {"width": 3, "depth": 2, "scale": [1, 2]}
    assert described == {"name": "noted_in_a_test", "arguments": arguments}
    assert build("network", described).config == arguments
    with pytest.raises(ValueError, match="does not take these arguments"):
        build("network", {**described, "arguments": {}})


def test_what_no_file_can_hold_is_refused():
    @register_network("holds_a_tensor_in_a_test")
    class Holds(nn.Module):
        def __init__(self, start):
            super().__init__()

    with pytest.raises(ValueError, match="its argument start is a Tensor"):
        describe_network(Holds(torch.zeros(2)))


def test_a_name_is_of_one_class_and_its_newest_definition():
    with pytest.raises(ValueError, match="'unet' is registered already, by consistency"):

        @register_network("unet")
        class Mine(nn.Module):
            def __init__(self):
                super().__init__()

    def define():
        @register_network("twice_in_a_test")
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()

        return Twice

    define()
    newest = define()
    assert find("network", "twice_in_a_test") is newest
