//! Replaces the emulated device in builds without the feature.

use super::EmulatorOptions;
use crate::gpu::{DeviceError, Driver};

pub fn open(_: EmulatorOptions) -> Result<Box<dyn Driver>, DeviceError> {
    Err(DeviceError::Unavailable("this build has no emulator (feature `emulator`)".to_owned()))
}
