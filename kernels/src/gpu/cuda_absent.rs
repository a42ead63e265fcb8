//! Replaces the CUDA driver in builds without the feature `cuda`.

use super::{DeviceError, Driver};

pub(super) fn open(_index: u32) -> Result<Box<dyn Driver>, DeviceError> {
    Err(DeviceError::Unavailable("this build has no CUDA support (feature `cuda`)".to_owned()))
}
