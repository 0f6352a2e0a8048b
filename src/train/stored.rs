//! Tensors as bytes, for caches on the disk.

use anyhow::{Result, bail};
use candle_core::{Device, Tensor};

/// Number of dimensions, dimensions, then the values in f32, all little-endian.
pub fn bytes_from_tensor(tensor: &Tensor) -> Result<Vec<u8>> {
    let dims = tensor.dims();
    let mut bytes = (dims.len() as u32).to_le_bytes().to_vec();
    bytes.extend(dims.iter().flat_map(|&dim| (dim as u32).to_le_bytes()));
    bytes.extend(tensor.flatten_all()?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes));
    Ok(bytes)
}

/// On the host.
pub fn tensor_from_bytes(bytes: &[u8]) -> Result<Tensor> {
    let words: Vec<[u8; 4]> = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]).collect();
    let Some((rank, words)) = words.split_first() else { bail!("too short") };
    let Some((dims, values)) = words.split_at_checked(u32::from_le_bytes(*rank) as usize) else { bail!("too short") };
    let dims: Vec<usize> = dims.iter().map(|&dim| u32::from_le_bytes(dim) as usize).collect();
    let values: Vec<f32> = values.iter().map(|&value| f32::from_le_bytes(value)).collect();
    Ok(Tensor::from_vec(values, dims, &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_comes_back_as_it_was_and_half_of_it_is_refused() {
        let tensor = Tensor::new(&[[1.5f32, -0.0, f32::MIN_POSITIVE], [3.0, 4.0, 5.0]], &Device::Cpu).unwrap();
        let bytes = bytes_from_tensor(&tensor).unwrap();
        let again = tensor_from_bytes(&bytes).unwrap();
        assert_eq!(again.dims(), [2, 3]);
        let bits =
            |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits);
        assert!(bits(&again).eq(bits(&tensor)));
        for length in [0, 3, 4, 11, 16, bytes.len() - 1] {
            assert!(tensor_from_bytes(&bytes[..length]).is_err(), "{length}");
        }
    }
}
