//! The tensors of a network where they lie: in a mapped file, inside the binary, or in memory. Each is read when a layer
//! asks for it, so that loading a model never holds its weights twice.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use super::weight_file::WeightFile;

/// The tensors of one network by name, and where they come from.
#[derive(Clone, Debug)]
pub struct Weights {
    origin: String,
    tensors: BTreeMap<String, Stored>,
}

impl Weights {
    /// `origin` (a path) is named in errors.
    pub fn new(origin: impl Into<String>, tensors: BTreeMap<String, Stored>) -> Self {
        Self { origin: origin.into(), tensors }
    }

    /// Tensors that are in memory already.
    pub fn in_memory(origin: impl Into<String>, tensors: BTreeMap<String, Tensor>) -> Self {
        Self::new(origin, tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect())
    }

    /// Where they come from, for people.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// By name, sorted.
    pub fn tensors(&self) -> &BTreeMap<String, Stored> {
        &self.tensors
    }

    /// Those whose names `is_read`: checkpoints hold more than a network reads (buffers, other halves, training's own).
    pub fn only(&self, is_read: impl Fn(&str) -> bool) -> Self {
        let kept = self.tensors.iter().filter(|(name, _)| is_read(name));
        Self::new(self.origin.clone(), kept.map(|(name, stored)| (name.clone(), stored.clone())).collect())
    }

    /// Adds a tensor, or puts it in the place of the one of that name.
    pub fn insert(&mut self, name: impl Into<String>, tensor: impl Into<Stored>) {
        self.tensors.insert(name.into(), tensor.into());
    }

    /// One tensor on the CPU in its own dtype.
    pub fn load(&self, name: &str) -> Result<Tensor> {
        let stored = self.tensors.get(name).with_context(|| format!("{}: tensor {name} is missing", self.origin))?;
        stored.load(&Device::Cpu).with_context(|| format!("{}: tensor {name}", self.origin))
    }

    /// All tensors on the CPU in their own dtypes.
    pub fn load_all(&self) -> Result<BTreeMap<String, Tensor>> {
        self.tensors.keys().map(|name| Ok((name.clone(), self.load(name)?))).collect()
    }
}

/// A tensor that is read when it is asked for.
#[derive(Clone, Debug)]
pub struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    /// Bytes of the file's data.
    File {
        file: Arc<WeightFile>,
        range: Range<usize>,
    },
    Memory(Tensor),
    /// One below the other along the first dimension.
    Stack(Vec<Stored>),
    /// A matrix whose columns are the rows.
    Transposed(Box<Stored>),
}

impl From<Tensor> for Stored {
    fn from(tensor: Tensor) -> Self {
        Self { dtype: tensor.dtype().into(), shape: tensor.dims().to_vec(), place: Place::Memory(tensor) }
    }
}

impl Stored {
    /// Bytes of a file; `range` must be as long as dtype and shape say.
    pub(super) fn in_file(file: Arc<WeightFile>, range: Range<usize>, dtype: Dtype, shape: Vec<usize>) -> Self {
        Self { dtype, shape, place: Place::File { file, range } }
    }

    /// Number format that it lies in.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many numbers it has.
    pub fn n_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Reads it, in its own dtype.
    pub fn load(&self, device: &Device) -> Result<Tensor> {
        Ok(match &self.place {
            Place::File { file, range } => {
                let dtype = DType::try_from(self.dtype)?;
                let tensor = Tensor::from_raw_buffer(file.data(range.clone()), dtype, &self.shape, device)?;
                file.release(range.clone());
                tensor
            }
            Place::Memory(tensor) if tensor.dims() == self.shape => tensor.to_device(device)?,
            Place::Memory(tensor) => tensor.reshape(self.shape.as_slice())?.to_device(device)?,
            Place::Stack(parts) => {
                let parts = parts.iter().map(|part| part.load(device)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, 0)?.reshape(self.shape.as_slice())?
            }
            Place::Transposed(matrix) => matrix.load(device)?.t()?.contiguous()?.reshape(self.shape.as_slice())?,
        })
    }

    /// The same numbers under another shape of as many.
    pub fn reshaped(&self, shape: &[usize]) -> Result<Self> {
        anyhow::ensure!(
            shape.iter().product::<usize>() == self.n_values(),
            "shape {:?} cannot become {shape:?}",
            self.shape
        );
        Ok(Self { shape: shape.to_vec(), ..self.clone() })
    }

    /// Some of its rows (slices along the first dimension).
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let n_rows = self.shape.first().copied().unwrap_or(0);
        anyhow::ensure!(rows.start <= rows.end && rows.end <= n_rows, "no rows {rows:?} in shape {:?}", self.shape);
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        let place = match &self.place {
            Place::File { file, range } => {
                let row_bytes = range.len() / n_rows.max(1);
                let start = range.start + rows.start * row_bytes;
                Place::File { file: file.clone(), range: start..start + rows.len() * row_bytes }
            }
            _ => Place::Memory(self.load(&Device::Cpu)?.narrow(0, rows.start, rows.len())?),
        };
        Ok(Self { dtype: self.dtype, shape, place })
    }

    /// The matrix whose rows are this one's columns.
    pub fn transposed(&self) -> Result<Self> {
        let &[rows, columns] = self.shape.as_slice() else { anyhow::bail!("shape {:?} is no matrix", self.shape) };
        Ok(Self { dtype: self.dtype, shape: vec![columns, rows], place: Place::Transposed(Box::new(self.clone())) })
    }

    /// Tensors of one dtype and row shape, one below the other.
    pub fn stacked(parts: Vec<Stored>) -> Result<Self> {
        let first = parts.first().context("nothing to stack")?;
        let same = |part: &Stored| part.dtype == first.dtype && part.shape.get(1..) == first.shape.get(1..);
        anyhow::ensure!(!first.shape.is_empty() && parts.iter().all(same), "tensors of unlike shapes or dtypes");
        let mut shape = first.shape.clone();
        shape[0] = parts.iter().map(|part| part.shape[0]).sum();
        Ok(Self { dtype: first.dtype, shape, place: Place::Stack(parts) })
    }

    /// The dtype that it has once written where `wanted` is asked for: integers stay what they are.
    pub fn written_dtype(&self, wanted: Option<DType>) -> Dtype {
        let is_float = DType::try_from(self.dtype).is_ok_and(|dtype| dtype.is_float());
        wanted.filter(|_| is_float).map_or(self.dtype, Into::into)
    }

    /// Hands its little-endian bytes to `write`, in the dtype that [`Stored::written_dtype`] tells.
    pub(super) fn with_bytes<T>(
        &self,
        wanted: Option<DType>,
        write: impl FnOnce(&[u8]) -> std::io::Result<T>,
    ) -> Result<T> {
        let dtype = self.written_dtype(wanted);
        if let Place::File { file, range } = &self.place
            && dtype == self.dtype
        {
            let outcome = write(file.data(range.clone()))?;
            file.release(range.clone());
            return Ok(outcome);
        }
        let tensor = self.load(&Device::Cpu)?.to_dtype(DType::try_from(dtype)?)?;
        Ok(write(&safetensors::View::data(&tensor))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 3 rows of 2, in a mapped file and in memory.
    fn both() -> (tempfile::TempDir, [Stored; 2]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let tensor = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu).unwrap();
        super::super::write::write_tensors(&path, &[("x".to_owned(), tensor.clone())].into(), &[]).unwrap();
        let file = WeightFile::open(&path).unwrap().tensors().remove("x").unwrap();
        (folder, [file, tensor.into()])
    }

    fn values(stored: &Stored) -> Vec<f32> {
        stored.load(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn rows_and_shapes_are_the_same_in_a_file_and_in_memory() {
        let (_folder, both) = both();
        for stored in both {
            assert_eq!((stored.shape(), values(&stored)), (&[3, 2][..], vec![1., 2., 3., 4., 5., 6.]));
            let rows = stored.rows(1..3).unwrap();
            assert_eq!((rows.shape(), values(&rows)), (&[2, 2][..], vec![3., 4., 5., 6.]));
            let column = rows.reshaped(&[4, 1]).unwrap();
            assert_eq!(column.load(&Device::Cpu).unwrap().dims(), [4, 1]);
            assert!(stored.rows(2..4).is_err() && stored.reshaped(&[5]).is_err());
            let stack = Stored::stacked(vec![rows, stored.rows(0..1).unwrap()]).unwrap();
            assert_eq!((stack.shape(), values(&stack)), (&[3, 2][..], vec![3., 4., 5., 6., 1., 2.]));
            assert!(Stored::stacked(vec![stack, column]).is_err());
            let turned = stored.transposed().unwrap();
            assert_eq!((turned.shape(), values(&turned)), (&[2, 3][..], vec![1., 3., 5., 2., 4., 6.]));
            assert_eq!(values(&turned.rows(1..2).unwrap()), [2., 4., 6.]);
            let bytes = turned.with_bytes(None, |bytes| Ok(bytes.to_vec())).unwrap();
            assert_eq!(bytes, [1f32, 3., 5., 2., 4., 6.].map(f32::to_le_bytes).concat());
            assert!(turned.reshaped(&[6]).unwrap().transposed().is_err());
        }
    }

    /// What was released must come back from the file.
    #[test]
    fn a_tensor_can_be_read_again() {
        let (_folder, [stored, _]) = both();
        assert_eq!(values(&stored), values(&stored));
    }

    #[test]
    fn bytes_are_cast_but_for_integers() {
        let (_folder, both) = both();
        for stored in both {
            let bytes = |dtype| stored.with_bytes(dtype, |bytes| Ok(bytes.to_vec())).unwrap();
            assert_eq!(bytes(None), [1f32, 2., 3., 4., 5., 6.].map(f32::to_le_bytes).concat());
            assert_eq!(bytes(Some(DType::BF16)).len(), 12);
            // bf16 is the upper half of f32.
            assert_eq!(bytes(Some(DType::BF16))[2..4], 2f32.to_le_bytes()[2..]);
        }
        let integers = Stored::from(Tensor::new(&[1i64], &Device::Cpu).unwrap());
        assert_eq!(integers.written_dtype(Some(DType::F16)), Dtype::I64);
    }
}
