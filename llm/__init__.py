"""Language models: data, backbones, the partial-masking family (MDM-Prime), and the tasks that wire them."""
