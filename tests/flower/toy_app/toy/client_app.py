"""toy: the ClientApp."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from toy.task import load_data
from toy.task import test as test_fn
from toy.task import train as train_fn

app = ClientApp()


def unpack(msg: Message, context: Context):
    model = {name: array.numpy() for name, array in msg.content["arrays"].items()}
    return model, *load_data(context.node_config["partition-id"])


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model, x, y = unpack(msg, context)
    loss = train_fn(model, x, y, msg.content["config"]["lr"], context.run_config["local-steps"])
    arrays = ArrayRecord({name: Array(values) for name, values in model.items()})
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(y)})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model, x, y = unpack(msg, context)
    metrics = MetricRecord({"eval_loss": test_fn(model, x, y), "num-examples": len(y)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
