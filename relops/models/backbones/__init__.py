"""Networks that compute feature maps. `relops.models` exports the networks that users build by name."""
