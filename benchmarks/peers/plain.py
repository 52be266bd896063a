"""torchvision's ImageFolder, PyTorch's DataLoader, fp32, the default layout: the loop of most repositories."""

from peers.common import main
from peers.loop import Style, rates

if __name__ == "__main__":
    main(lambda row: rates(row, Style()))
