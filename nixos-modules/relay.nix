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
  addresses = import ./addresses.nix { inherit lib; };
  checked = import ./checked-settings.nix { inherit lib pkgs; } "lacis-relay" { inherit cfg; };
  listeners = lib.types.coercedTo lib.types.str lib.singleton (
    lib.types.listOf addresses.types.listener
  );
  open = lib.filter (address: !addresses.isLoopback address && addresses.portOf address != 0);
  reachable = open cfg.settings.listen ++ open cfg.settings.stun;
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
      description = "Whether to open the TCP ports of `settings.listen` and the UDP ports of `settings.stun`, loopback left out.";
    };

    settings = lib.mkOption {
      default = { };
      description = "The configuration of the relay. Keys that have no option here are passed on and checked at build time.";
      example = lib.literalExpression ''
        {
          hostname = "relay.example.org";
          admission.verify_url = "https://mesh.example.org/verify";
        }
      '';
      type = lib.types.submodule {
        freeformType = format.type;
        options = {
          listen = lib.mkOption {
            type = listeners;
            default = [ "[::]:443" ];
            example = [ "127.0.0.1:8443" ];
            description = "Addresses to listen on for clients (TCP).";
          };
          stun = lib.mkOption {
            type = listeners;
            default = [ "[::]:3478" ];
            example = [ ];
            description = "Addresses to answer STUN at (UDP); none turns STUN off.";
          };
        };
      };
    };
  };

  config = lib.mkIf cfg.enable {
    warnings =
      checked.warnings
      ++ lib.optional (cfg.openFirewall && reachable == [ ])
        "services.lacis.relay.openFirewall opens nothing: the relay listens on loopback only.";

    environment.etc."lacis/relay.yaml".source = checked.file;

    # The unit comes with the package; only what depends on the options is added here.
    systemd.packages = [ cfg.package ];
    systemd.services.lacis-relay = {
      wantedBy = [ "multi-user.target" ];
      restartTriggers = [ checked.file ];
      stopIfChanged = false;
    };

    networking.firewall = lib.mkIf cfg.openFirewall {
      allowedTCPPorts = lib.unique (map addresses.portOf (open cfg.settings.listen));
      allowedUDPPorts = lib.unique (map addresses.portOf (open cfg.settings.stun));
    };
  };
}
