"""Papers' claims against what this machine measures; each module has `PAPER` and `reproduce(folder, quick) -> criteria`."""

REPRODUCTIONS = {
    "osp": "launch.reproductions.osp",
    "delta_activation": "launch.reproductions.delta_activation",
    "fire_together": "launch.reproductions.fire_together",
    "crrelu": "launch.reproductions.crrelu",
    "sparsing_law": "launch.reproductions.sparsing_law",
    "dense_to_sparse": "launch.reproductions.dense_to_sparse",
    "sparse_unified": "launch.reproductions.sparse_unified",
}
