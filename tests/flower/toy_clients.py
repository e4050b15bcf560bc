"""A ClientApp whose actions do what real clients do, well and badly. Worker processes import it from here."""

import os
import random
import sys
import time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
KEPT = []  # what a careless client holds on to


@app.train("noisy")
def noisy(msg: Message, context: Context) -> Message:
    """Training that draws from every global generator and adds to what the node has kept."""
    weights = torch.from_numpy(msg.content["arrays"]["w"].numpy())
    layer = torch.nn.Linear(weights.numel(), 64)
    step = layer(weights + torch.randn_like(weights)).square().sum() + random.random() + np.random.normal()
    before = context.state["arrays"]["sum"].numpy() if "arrays" in context.state else np.zeros(1)
    context.state["arrays"] = ArrayRecord({"sum": Array(before + step.item())})
    return Message(RecordDict({"arrays": context.state["arrays"]}), reply_to=msg)


@app.train("careless")
def careless(msg: Message, context: Context) -> Message:
    """Changes what it received, answers with it, keeps it as its state, and changes it again the next time."""
    for record in KEPT:
        record["w"].data = b"changed later"
        record["new"] = Array(np.zeros(1))
    received = msg.content["arrays"]
    received["w"].data = Array(np.full(3, 7.0)).data
    msg.content["config"]["list"].append(4)
    msg.content["config"]["new"] = 1
    context.state["arrays"] = received
    context.run_config["mine"] = 1
    KEPT.append(received)
    return Message(RecordDict({"arrays": received}), reply_to=msg)


@app.query("count")
def count(msg: Message, context: Context) -> Message:
    """How many such messages the node has had."""
    context.state["count"] = MetricRecord({"n": context.state["count"]["n"] + 1 if "count" in context.state else 1})
    return Message(RecordDict({"count": context.state["count"]}), reply_to=msg)


@app.query("where")
def where(msg: Message, context: Context) -> Message:
    """In which process, as which node, with how many threads."""
    record = ConfigRecord({"pid": os.getpid(), "threads": torch.get_num_threads(), **context.node_config})
    time.sleep(msg.content["config"]["seconds"] if "config" in msg.content else 0)
    return Message(RecordDict({"where": record}), reply_to=msg)


@app.query("sleep")
def sleep(msg: Message, context: Context) -> Message:
    """Work for a minute."""
    print("pid", os.getpid(), flush=True)
    time.sleep(60)
    return Message(RecordDict(), reply_to=msg)


@app.query("fail")
def fail(msg: Message, context: Context) -> Message:
    """Fail in one of the ways there are, after having changed its state."""
    context.state["count"] = MetricRecord({"n": 1000})
    how = msg.content["config"]["how"]
    if how == "raise":
        raise ValueError("no data today")
    if how == "exit":
        sys.exit("gave up")
    if how == "none":
        return None
    if how == "echo":
        return msg
    os._exit(3)
