"""toy: the ServerApp."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from toy.task import new_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Main entry point for the ServerApp."""
    arrays = ArrayRecord({name: Array(values) for name, values in new_model().items()})
    strategy = FedAvg(
        fraction_evaluate=context.run_config["fraction-evaluate"],
        min_train_nodes=context.run_config["min-nodes"],
        min_evaluate_nodes=context.run_config["min-nodes"],
        min_available_nodes=context.run_config["min-nodes"],
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    # What remains of the run: the final model and the last round's loss on the clients.
    context.state["arrays"] = result.arrays
    context.state["metrics"] = result.evaluate_metrics_clientapp[context.run_config["num-server-rounds"]]
