import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(array, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, images, labels, *, image="image", label="label", names=None):
    """Write the schema of the Hugging Face hub, without its library."""
    features = {image: {"_type": "Image"}}
    if label and names:
        features[label] = {"names": names, "_type": "ClassLabel"}
    elif label:
        kind = "string" if labels and isinstance(labels[0], str) else "int64"
        features[label] = {"dtype": kind, "_type": "Value"}
    content = pa.array(
        [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    columns = {image: content}
    if label:
        string = features[label].get("dtype") == "string"
        columns[label] = pa.array(labels, pa.string() if string else pa.int64())
    info = json.dumps({"info": {"features": features}})
    table = pa.table(columns).replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def random_pngs(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    return [png(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in range(count)]
