"""Keras on its PyTorch backend: `model.fit` over pictures read by `image_dataset_from_directory`'s torch counterpart.

Keras' own directory reader needs TensorFlow, so the pictures come through torchvision's ImageFolder and a DataLoader,
which Keras takes. The networks are built from Keras layers after the paper: same depths, widths and strides.
"""

import os

os.environ["KERAS_BACKEND"] = "torch"

from typing import Any

from peers.common import CLASSES, Row, batch_of, clock, main, peak, pictures, rate

SHAPES = {  # stage depths, stage widths, bottleneck, projection shortcuts
    "resnet20": ((3, 3, 3), (16, 32, 64), False),
    "resnet18": ((2, 2, 2, 2), (64, 128, 256, 512), False),
    "resnet50": ((3, 4, 6, 3), (64, 128, 256, 512), True),
}


def build(row: Row) -> Any:
    """Return the network of the row, channels last as Keras has it."""
    from keras import Model, layers

    depths, widths, deep = SHAPES[row.network]

    def conv(x: Any, channels: int, size: int, stride: int = 1) -> Any:
        x = layers.Conv2D(channels, size, stride, "same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    x = inputs = layers.Input((row.size, row.size, 3))
    x = layers.ReLU()(conv(x, widths[0], 3) if row.size <= 64 else conv(x, widths[0], 7, 2))
    if row.size > 64:
        x = layers.MaxPooling2D(3, 2, "same")(x)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for index in range(depth):
            stride, out = (2 if stage and not index else 1), width * (4 if deep else 1)
            short = x if stride == 1 and x.shape[-1] == out else conv(x, out, 1, stride)
            sizes = [(width, 1, 1), (width, 3, stride), (out, 1, 1)] if deep else [(width, 3, stride), (out, 3, 1)]
            for number, (channels, size, step) in enumerate(sizes):
                x = conv(x, channels, size, step)
                x = layers.ReLU()(x if number < len(sizes) - 1 else layers.Add()([x, short]))
    return Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x)))


def rates(row: Row) -> dict[str, float]:
    """Measure a step, an epoch of `fit`, and inference."""
    import keras
    import torch

    model = build(row)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9, weight_decay=1e-4), loss)
    batches = torch.utils.data.DataLoader(pictures(row), row.batch, shuffle=True, drop_last=True)

    def last(batch: Any) -> Any:
        return batch[0].permute(0, 2, 3, 1), batch[1]

    class Batches(keras.utils.PyDataset):
        """The loader's batches, channels last."""

        def __init__(self) -> None:
            super().__init__()
            self.batches = iter(batches)

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> Any:
            return tuple(part.numpy() for part in last(next(self.batches)))

    images, labels = last(batch_of(row))
    found = {"step": rate(lambda: model.train_on_batch(images, labels), row.batch, row.tries)}
    begun = clock()
    model.fit(Batches(), epochs=1, verbose=0, shuffle=False)
    found |= {"epoch": len(batches) * row.batch / (clock() - begun), "peak": peak()}
    return {**found, "inference": rate(lambda: model.predict_on_batch(images), row.batch, row.tries)}


if __name__ == "__main__":
    main(rates)
