# services.lacis.relay: a DERP relay with STUN, apart from the coordinator.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.lacis.relay;
  format = pkgs.formats.json { };
  checked = import ./checked-settings.nix { inherit lib pkgs; } "lacis-relay" cfg;
in
{
  options.services.lacis.relay = {
    enable = lib.mkEnableOption "the Lacis relay (DERP and STUN)";

    package = lib.mkPackageOption pkgs "lacis-relay" { };

    validate = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = "Whether to check the settings with `lacis-relay check` when the system is built.";
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether to open TCP 443 and STUN's UDP port 3478.";
    };

    settings = lib.mkOption {
      default = { };
      description = "The configuration of the relay. Keys that have no option here are passed on and checked at build time.";
      type = lib.types.submodule { freeformType = format.type; };
    };
  };

  config = lib.mkIf cfg.enable {
    environment.etc."lacis/relay.yaml".source = checked;

    # The unit comes with the package; only what depends on the options is added here.
    systemd.packages = [ cfg.package ];
    systemd.services.lacis-relay = {
      wantedBy = [ "multi-user.target" ];
      restartTriggers = [ checked ];
      stopIfChanged = false;
    };

    networking.firewall = lib.mkIf cfg.openFirewall {
      allowedTCPPorts = [ 443 ];
      allowedUDPPorts = [ 3478 ];
    };
  };
}
