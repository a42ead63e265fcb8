//! Copies of blocks against the same copies on the host.

use super::{Check, CheckFailure, Random, equal};
use crate::gpu::copy::{BlockPoolShape, copy_blocks};
use crate::gpu::{Device, DeviceBuffer};

pub const CHECKS: &[Check] = &[Check { name: "copy_blocks", run: blocks }];

fn blocks(device: &Device, seed: u64) -> Result<(), CheckFailure> {
    let mut random = Random::new(seed);
    // More copies than one launch takes, and a block that no number of threads divides.
    let shape = BlockPoolShape {
        num_layers: 1 + random.below(3),
        num_blocks: 150 + random.below(20),
        block_bytes: 16 * (250 + random.below(20)),
    };
    let order = random.permutation(shape.num_blocks);
    let copies: Vec<(usize, usize)> = order[..140].chunks(2).map(|pair| (pair[0], pair[1])).collect();
    let mut host = [random.bytes(shape.bytes()), random.bytes(shape.bytes())];
    let mut keys = DeviceBuffer::from_slice(device, &host[0])?;
    let mut values = DeviceBuffer::from_slice(device, &host[1])?;
    copy_blocks(device, &mut keys, &mut values, shape, &copies)?;
    for pool in &mut host {
        for layer in pool.chunks_mut(shape.num_blocks * shape.block_bytes) {
            for (from, to) in &copies {
                let start = from * shape.block_bytes;
                layer.copy_within(start..start + shape.block_bytes, to * shape.block_bytes);
            }
        }
    }
    equal("keys", &keys.to_vec()?, &host[0])?;
    equal("values", &values.to_vec()?, &host[1])
}
