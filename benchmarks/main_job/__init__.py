"""Does GeN find a learning rate that the bare optimizer needs to be told? On handwritten digits, from three of them."""
