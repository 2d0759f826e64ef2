#![cfg_attr(feature = "kernel", no_std)]
