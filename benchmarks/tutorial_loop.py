"""The tutorial's training loop beside ours, on the same network, batch, data and precision: images a second.

    python benchmarks/tutorial_loop.py DATA [--images 256] [--rounds 2]

DATA is CIFAR-10 as parquet. The peer is written from the tutorial's description: torchvision transforms a picture at a
time (ToTensor, Normalize, Resize to 224 px), a DataLoader with its defaults, the network in PyTorch's default layout,
Adam with its defaults, the loss and the count of hits read after every batch. Ours is `resnetlab train --recipe
tutorial` as a user runs it, without its start-up. Both run alternately, each in its own process; one line a round,
then medians and the ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from resnetlab import threads

BATCH = 128
"""Images; a rest that does not fill a batch is left out, as by the tutorial."""


def tutorial(data: str, images: int) -> float:
    """Return the images a second of the loop as the tutorial writes it."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from resnetlab import create_model, sources

    train = sources.load(data).train
    transform = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            transforms.Resize((224, 224), antialias=True),
        ]
    )

    class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return images

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(Image.fromarray(train.images[index])), int(train.labels[index])

    model = create_model("resnet50-tutorial", num_classes=10)
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters())
    criterion = torch.nn.CrossEntropyLoss()
    model.train()
    begun, loss_sum, correct = time.perf_counter(), 0.0, 0
    for inputs, labels in loader:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += int((outputs.argmax(1) == labels).sum())
    return BATCH * len(loader) / (time.perf_counter() - begun)


def ours(data: str, images: int) -> float:
    """Return the images a second of the recipe ``tutorial``, data included."""
    from resnetlab import session, training
    from resnetlab.console import Quiet

    settings = [f"data.limit={images}", "epochs=1", "data.val=0"]
    plan = session.plan(data, "resnet50-tutorial", "tutorial", settings, Quiet())
    state = training.start(plan.recipe, plan.prepared, plan.runtime)
    begun = time.perf_counter()
    for _ in training.run(state):
        pass
    return BATCH * state.loader.steps / (time.perf_counter() - begun)


def main() -> None:
    """Run both alternately and print a line a round, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", choices=["tutorial", "ours"], help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.images < BATCH:
        parser.error(f"--images must be {BATCH} or more: a batch")
    if words.one == "ours":
        threads.choose_waiting()  # as the command does; the loop's wait as PyTorch's do
    if words.one:
        print(json.dumps({"tutorial": tutorial, "ours": ours}[words.one](words.data, words.images)))
        return
    rates: dict[str, list[float]] = {"tutorial": [], "ours": []}
    for number in range(words.rounds):
        for name, found in rates.items():
            command = [sys.executable, __file__, words.data, "--images", str(words.images), "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(float(done.stdout.splitlines()[-1]))
        print(f"round {number + 1}: " + ", ".join(f"{name} {found[-1]:.2f} images/s" for name, found in rates.items()))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    print(json.dumps({**medians, "ratio": medians["ours"] / medians["tutorial"], "images": words.images}))


if __name__ == "__main__":
    main()
