"""scikit-learn's MLPClassifier, one thread: whole epochs by partial_fit, which shuffles and cuts batches itself."""

import numpy as np
import sklearn
from sklearn.neural_network import MLPClassifier
from stopwatch import Stopwatch, kind_and_options, load_arrays, peak_memory_bytes, print_result, read_arguments
from threadpoolctl import threadpool_limits


def main() -> None:
    arguments = read_arguments()
    features, labels = load_arrays(arguments)
    features = features.reshape(len(features), -1)
    units = [options["units"] for kind, options in map(kind_and_options, arguments.model) if kind == "dense"]
    model = MLPClassifier(
        units[:-1],
        activation="relu",
        solver="adam",
        alpha=0.0,
        batch_size=arguments.batch_size,
        learning_rate_init=arguments.learning_rate,
        random_state=0,
    )
    stopwatch = Stopwatch()
    with threadpool_limits(1):
        # partial_fit goes over all it is given once: over one batch is one step.
        model.partial_fit(
            features[: arguments.batch_size], labels[: arguments.batch_size], classes=np.arange(units[-1])
        )
        stopwatch.step_done()
        for _ in range(arguments.epochs):
            model.partial_fit(features, labels)
            stopwatch.epoch_done(len(features))
    print_result(
        stopwatch,
        peak_memory_bytes=peak_memory_bytes(),
        train_loss=float(model.loss_),
        version=f"scikit-learn {sklearn.__version__}",
    )


if __name__ == "__main__":
    main()
