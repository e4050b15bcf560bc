"""quickstart: the model and what each client does with it."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES = 16, 4

# One thread: the same sums in the same order, whichever process trains.
torch.set_num_threads(1)


class Net(nn.Module):
    """A small classifier, with a batch norm and hence buffers, one of them an integer counter."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(FEATURES, 32)
        self.norm = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


def load_data(partition_id, batch_size):
    """One client's noisy clusters, more of one class than of the others: (trainloader, testloader)."""
    centers = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    own = torch.Generator().manual_seed(1 + partition_id)
    shares = torch.ones(CLASSES)
    shares[partition_id % CLASSES] = 4.0
    labels = torch.multinomial(shares, 160 + 40 * partition_id, replacement=True, generator=own)
    points = centers[labels] + torch.randn(len(labels), FEATURES, generator=own)
    split = len(labels) * 4 // 5
    train, test = TensorDataset(points[:split], labels[:split]), TensorDataset(points[split:], labels[split:])
    return DataLoader(train, batch_size, shuffle=True, generator=own), DataLoader(test, batch_size)


def train(net, trainloader, epochs, lr):
    """Train and return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    net.train()
    total = 0.0
    for _ in range(epochs):
        for points, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(points), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader))


def test(net, testloader):
    """Loss and accuracy."""
    criterion = nn.CrossEntropyLoss(reduction="sum")
    net.eval()
    loss, correct, seen = 0.0, 0, 0
    with torch.no_grad():
        for points, labels in testloader:
            outputs = net(points)
            loss += criterion(outputs, labels).item()
            correct += (outputs.argmax(1) == labels).sum().item()
            seen += len(labels)
    return loss / seen, correct / seen
